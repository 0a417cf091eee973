/* SPDX-License-Identifier: Apache-2.0
 *
 * Vision Mamba from C and from any language that calls C: load a vimcore file, make the network's input of pictures,
 * run. See cpp/examples/infer.c.
 *
 * Every function that can fail returns a status; anything but VIMCORE_OK leaves the outputs alone, and
 * vimcore_last_error() says what was wrong. NULL, destroyed and foreign handles are VIMCORE_INVALID_ARGUMENT.
 * A model may be used by many threads at once. Calls on one session wait for each other: make one per thread.
 */
#ifndef VIMCORE_C_API_H
#define VIMCORE_C_API_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define VIMCORE_API __attribute__((visibility("default")))
#else
#define VIMCORE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum vimcore_status {
    VIMCORE_OK = 0,
    VIMCORE_INVALID_ARGUMENT = 1, /* the caller's mistake: handle, shape, option, too small a buffer */
    VIMCORE_FAILED = 2,           /* a file or the machine: missing, damaged, not supported by this build */
    VIMCORE_OUT_OF_MEMORY = 3,
    VIMCORE_INTERNAL = 4 /* a fault of the library */
} vimcore_status;

typedef struct vimcore_model vimcore_model;     /* a loaded network, immutable */
typedef struct vimcore_session vimcore_session; /* scratch memory and threads of one caller */

typedef struct vimcore_model_info {
    int64_t channels, height, width; /* an image: channels * height * width floats */
    int64_t outputs;                 /* floats per image of vimcore_session_run */
    int64_t classes;                 /* 0: the network has no head, and outputs are features */
    int64_t tokens, embed_dim;       /* floats per image of vimcore_session_features: tokens * embed_dim */
    int64_t frames; /* 0, or those of a clip, which is the "image": channels * frames * height * width floats */
} vimcore_model_info;

VIMCORE_API const char* vimcore_version(void); /* "0.2.0" */

/* What the last call of this thread that failed had to say, UTF-8, "" before any did. Valid until the next failure. */
VIMCORE_API const char* vimcore_last_error(void);

/* device: "cpu", "cuda" or "cuda:N"; NULL is "cpu". img_height, img_width in pixels, 0 as stored; another size resizes
 * the position table. A session keeps its model alive. */
VIMCORE_API vimcore_status vimcore_model_load(const char* path, const char* device, int64_t img_height,
                                              int64_t img_width, vimcore_model** model);
/* The same for sessions of one dtype alone, see vimcore_session_create: with "bf16" on the CPU, a third of the memory.
 */
VIMCORE_API vimcore_status vimcore_model_load_for(const char* path, const char* device, int64_t img_height,
                                                  int64_t img_width, const char* dtype, vimcore_model** model);
VIMCORE_API void vimcore_model_destroy(vimcore_model* model); /* NULL is allowed */
VIMCORE_API vimcore_status vimcore_model_get_info(const vimcore_model* model, vimcore_model_info* info);

/* Name of a class, NULL where the file has none; text of a metadata key such as "vimcore.config" (JSON), NULL where
 * absent. Both valid as long as the model handle. */
VIMCORE_API vimcore_status vimcore_model_label(const vimcore_model* model, int64_t index, const char** label);
VIMCORE_API vimcore_status vimcore_model_metadata(const vimcore_model* model, const char* key, const char** value);

/* One image of the network's input from a JPEG, PNG, PPM or PGM file or its bytes, by the steps that the model's file
 * tells: resize, centre crop, normalise. `capacity` is what `image` holds, in floats. */
VIMCORE_API vimcore_status vimcore_load_image(const vimcore_model* model, const char* path, float* image,
                                              size_t capacity);
VIMCORE_API vimcore_status vimcore_decode_image(const vimcore_model* model, const void* bytes, size_t size,
                                                float* image, size_t capacity);

/* threads 0: as many as the machine has cores, 1024 at most. At most max_batch images are worked on at a time; a larger
 * batch is cut. dtype of the activations: NULL or "f32", "bf16", on CUDA also "f16". */
VIMCORE_API vimcore_status vimcore_session_create(const vimcore_model* model, int threads, int64_t max_batch,
                                                  const char* dtype, vimcore_session** session);
VIMCORE_API void vimcore_session_destroy(vimcore_session* session); /* NULL is allowed */

/* images: (batch, channels, height, width). logits: (batch, outputs); tokens: (batch, tokens, embed_dim), normalised,
 * class tokens included. `capacity` is what the output holds, in floats. */
VIMCORE_API vimcore_status vimcore_session_run(vimcore_session* session, const float* images, int64_t batch,
                                               float* logits, size_t capacity);
VIMCORE_API vimcore_status vimcore_session_features(vimcore_session* session, const float* images, int64_t batch,
                                                    float* tokens, size_t capacity);

/* Segmentation: a class for every pixel, by the file of a network with a head for it (vimcore/segment.h). On the CPU.
 * The same rules for handles, threads and errors. */
typedef struct vimcore_segmentation vimcore_segmentation;                 /* a loaded network, immutable */
typedef struct vimcore_segmentation_session vimcore_segmentation_session; /* of one caller */

typedef struct vimcore_segmentation_info {
    int64_t channels, height, width; /* a window, what the network sees at once: channels * height * width floats */
    int64_t classes;                 /* at most 255 */
} vimcore_segmentation_info;

VIMCORE_API vimcore_status vimcore_segmentation_load(const char* path, vimcore_segmentation** model);
VIMCORE_API void vimcore_segmentation_destroy(vimcore_segmentation* model); /* NULL is allowed */
VIMCORE_API vimcore_status vimcore_segmentation_get_info(const vimcore_segmentation* model,
                                                         vimcore_segmentation_info* info);
/* Name of a class, valid as long as the model handle, and its red, green and blue; either pointer may be NULL. */
VIMCORE_API vimcore_status vimcore_segmentation_class(const vimcore_segmentation* model, int64_t index,
                                                      const char** label, uint8_t colour[3]);

/* dtype of the backbone's activations: NULL or "f32", or "bf16"; the head computes in float32. */
VIMCORE_API vimcore_status vimcore_segmentation_session_create(const vimcore_segmentation* model, int threads,
                                                               const char* dtype,
                                                               vimcore_segmentation_session** session);
VIMCORE_API void vimcore_segmentation_session_destroy(vimcore_segmentation_session* session); /* NULL is allowed */

/* Classes of all pixels of a JPEG, PNG, PPM or PGM file, upright, of any size: (height, width), row by row. They stay
 * valid until the next picture of the session, or its end. */
VIMCORE_API vimcore_status vimcore_segment_file(vimcore_segmentation_session* session, const char* path,
                                                int64_t* height, int64_t* width, const uint8_t** classes);
/* The same of a decoded picture: rgb and classes are (height, width, 3) and (height, width). */
VIMCORE_API vimcore_status vimcore_segment_pixels(vimcore_segmentation_session* session, const uint8_t* rgb,
                                                  int64_t height, int64_t width, uint8_t* classes, size_t capacity);
/* Logits (batch, classes, height, width) of normalised windows (batch, channels, height, width). */
VIMCORE_API vimcore_status vimcore_segment_logits(vimcore_segmentation_session* session, const float* images,
                                                  int64_t batch, float* logits, size_t capacity);

#ifdef __cplusplus
}
#endif

#endif
