/* SPDX-License-Identifier: Apache-2.0
 * The C interface: the most probable class of each picture.  example_infer vim.safetensors cat.jpg dog.png
 * By hand: cc infer.c $(pkg-config --cflags --libs vimcore) -o example_infer   (a static library: --static too)
 * Pictures that cannot be read are reported and skipped; the exit status is 1 then. */
#include <stdio.h>
#include <stdlib.h>
#include <vimcore/c_api.h>

static int classify(const vimcore_model* model, vimcore_session* session, const vimcore_model_info* info,
                    const char* path)
{
    const size_t pixels = (size_t)(info->channels * info->height * info->width);
    float* image = malloc(pixels * sizeof(float));
    float* logits = malloc((size_t)info->outputs * sizeof(float));
    const char* label = NULL;
    int64_t best = 0;
    int failed = 1;
    if (!image || !logits) {
        fprintf(stderr, "%s: out of memory\n", path);
    } else if (vimcore_load_image(model, path, image, pixels) ||
               vimcore_session_run(session, image, 1, logits, (size_t)info->outputs)) {
        fprintf(stderr, "%s\n", vimcore_last_error());
    } else {
        for (int64_t i = 1; i < info->outputs; i++)
            if (logits[i] > logits[best]) best = i;
        vimcore_model_label(model, best, &label); /* stays NULL where the file has no labels */
        printf("%s: %d %s %.9g\n", path, (int)best, label ? label : "-", logits[best]);
        failed = 0;
    }
    free(logits);
    free(image);
    return failed;
}

int main(int argc, char** argv)
{
    vimcore_model* model = NULL;
    vimcore_session* session = NULL;
    vimcore_model_info info;
    int failed = 0;
    if (argc < 3) {
        fprintf(stderr, "usage: example_infer WEIGHTS PICTURE...\n");
        return 2;
    }
    if (vimcore_model_load(argv[1], "cpu", 0, 0, &model) || vimcore_model_get_info(model, &info) ||
        vimcore_session_create(model, 0, 1, NULL, &session)) {
        fprintf(stderr, "%s\n", vimcore_last_error());
        failed = 1;
    } else {
        for (int i = 2; i < argc; i++) failed |= classify(model, session, &info, argv[i]);
    }
    vimcore_session_destroy(session);
    vimcore_model_destroy(model);
    return failed;
}
