/* SPDX-License-Identifier: Apache-2.0
 * The C interface from C99: prints the info of a model and the logits of one image file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vimcore/c_api.h>

int main(int argc, char** argv)
{
    vimcore_model* model = NULL;
    vimcore_session* session = NULL;
    vimcore_model_info info;
    float *image, *logits;
    size_t pixels;
    int64_t i;
    if (argc != 3) return 2;
    if (vimcore_model_load("no such file", "cpu", 0, 0, &model) != VIMCORE_FAILED) return 3;
    if (!strstr(vimcore_last_error(), "no such file") || model) return 4;
    if (vimcore_model_get_info(NULL, &info) != VIMCORE_INVALID_ARGUMENT) return 5;
    if (vimcore_model_load(argv[1], NULL, 0, 0, &model) || vimcore_model_get_info(model, &info)) return 6;
    pixels = (size_t)(info.channels * info.height * info.width);
    image = malloc(pixels * sizeof(float));
    logits = malloc((size_t)info.outputs * sizeof(float));
    if (!image || !logits) return 7;
    if (vimcore_load_image(model, argv[2], image, pixels) || vimcore_session_create(model, 1, 1, NULL, &session) ||
        vimcore_session_run(session, image, 1, logits, (size_t)info.outputs)) {
        fprintf(stderr, "%s\n", vimcore_last_error());
        return 8;
    }
    for (i = 0; i < info.outputs; i++) printf("%.9g\n", logits[i]);
    vimcore_session_destroy(session);
    vimcore_model_destroy(model);
    free(logits);
    free(image);
    return 0;
}
