/* mlp.c - a perceptron learns to read digits, with the C interface of gsgd alone.
 *
 * The images are those of scikit-learn: 8 x 8 pixels, 1,797 of them. One line of Python writes them, each as
 * 64 pixels from 0 to 1 and its digit, all float32:
 *
 *     python -c "import numpy as np, sklearn.datasets as d; x, y = d.load_digits(return_X_y=True);
 *         np.c_[x / 16, y].astype('f').tofile('digits.bin')"
 *
 * make lib, then: cc -O2 -Ibuild/include examples/mlp.c build/lib/libgsgd.a -fopenmp -lm -o mlp && ./mlp
 * digits.bin
 */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "gsgd.h"

enum { PIXELS = 64, DIGITS = 10, LAYERS = 3, MOST = 64, TRAINING = 1500, BATCH = 50, EPOCHS = 20 };

static const ptrdiff_t width[LAYERS + 1] = {PIXELS, 64, 32, DIGITS};

/* Arrays 2 k and 2 k + 1 are the weight (width[k + 1], width[k]) and the bias (width[k + 1]) of layer k. */
enum { ARRAYS = 2 * LAYERS };

static float parameter[ARRAYS][MOST * MOST], gradient[ARRAYS][MOST * MOST], momentum[ARRAYS][MOST * MOST];
static float value[LAYERS + 1][MOST]; /* what each level holds for one image */

static float uniform(float low, float high) { return low + (high - low) * (float)rand() / (float)RAND_MAX; }

static void check(gsgd_status status, const char *what) {
    if (status == GSGD_OK)
        return;
    fprintf(stderr, "%s: status %d\n", what, (int)status);
    exit(EXIT_FAILURE);
}

/* The output for value[0]; the largest of the last level. */
static int forward(void) {
    for (int k = 0; k < LAYERS; k++)
        for (ptrdiff_t i = 0; i < width[k + 1]; i++) {
            float sum = parameter[2 * k + 1][i];
            for (ptrdiff_t j = 0; j < width[k]; j++)
                sum += parameter[2 * k][i * width[k] + j] * value[k][j];
            value[k + 1][i] = k + 1 < LAYERS ? fmaxf(sum, 0) : sum;
        }
    int best = 0;
    for (int i = 1; i < DIGITS; i++)
        best = value[LAYERS][i] > value[LAYERS][best] ? i : best;
    return best;
}

/* Add the gradient of the cross entropy of one image, over BATCH; the loss. */
static float backward(int digit) {
    float slope[LAYERS + 1][MOST], total = 0, largest = -FLT_MAX;
    for (int i = 0; i < DIGITS; i++)
        largest = fmaxf(largest, value[LAYERS][i]);
    for (int i = 0; i < DIGITS; i++)
        total += expf(value[LAYERS][i] - largest);
    for (int i = 0; i < DIGITS; i++)
        slope[LAYERS][i] = (expf(value[LAYERS][i] - largest) / total - (float)(i == digit)) / BATCH;
    for (int k = LAYERS; k-- > 0;) {
        for (ptrdiff_t j = 0; j < width[k]; j++)
            slope[k][j] = 0;
        for (ptrdiff_t i = 0; i < width[k + 1]; i++) {
            gradient[2 * k + 1][i] += slope[k + 1][i];
            for (ptrdiff_t j = 0; j < width[k]; j++) {
                gradient[2 * k][i * width[k] + j] += slope[k + 1][i] * value[k][j];
                slope[k][j] += value[k][j] > 0 ? slope[k + 1][i] * parameter[2 * k][i * width[k] + j] : 0;
            }
        }
    }
    return logf(total) + largest - value[LAYERS][digit];
}

/* Units are numbered level by level; inputs and outputs are pinned, and so is what biases read. */
static gsgd_plan *describe(ptrdiff_t *units) {
    static const int64_t constant = GSGD_PINNED;
    static int64_t unit[LAYERS + 1][MOST];
    static const gsgd_dim one = {1, 0, 0};
    gsgd_type types[ARRAYS];
    gsgd_block block[ARRAYS];
    *units = 0;
    for (int k = 0; k <= LAYERS; k++)
        for (ptrdiff_t i = 0; i < width[k]; i++)
            unit[k][i] = k == 0 || k == LAYERS ? GSGD_PINNED : (*units)++;
    for (int k = 0; k < LAYERS; k++) {
        const gsgd_dim rows = {width[k + 1], 1, 0}, cols = {width[k], 1, 1};
        block[2 * k] = (gsgd_block){2 * k, {one, rows, cols, one, one, one}, 0, 0, unit[k + 1], unit[k]};
        block[2 * k + 1] =
            (gsgd_block){2 * k + 1, {one, rows, one, one, one, one}, 0, 0, unit[k + 1], &constant};
        types[2 * k] = types[2 * k + 1] = GSGD_FLOAT32;
    }
    gsgd_plan *plan;
    check(gsgd_create(&plan, *units, ARRAYS, types, ARRAYS, block), "gsgd_create");
    return plan;
}

/* Choose the skeleton, and measure paths on the balanced scale. */
static void begin(gsgd_plan *plan, ptrdiff_t units, const gsgd_array *weights) {
    gsgd_edge *in = malloc(2 * (size_t)units * sizeof *in), *out = in + units;
    double *c = malloc(3 * (size_t)units * sizeof *c), *in_weight = c + units, *out_weight = c + 2 * units,
           left;
    uint8_t *free_in = malloc((size_t)units);
    int64_t unit;
    gsgd_choose_trees(plan, weights, GSGD_MODULO, NULL, in, out);
    check(gsgd_set_trees(plan, in, out, free_in, &unit), "gsgd_set_trees");
    check(gsgd_balance(plan, weights, c, &left), "gsgd_balance");
    for (ptrdiff_t u = 0; u < units; u++) { /* here a block is an array, and an entry its index */
        in_weight[u] = in[u].block < 0 ? 1 : parameter[in[u].block][in[u].entry];
        out_weight[u] = out[u].block < 0 ? 1 : parameter[out[u].block][out[u].entry];
    }
    gsgd_set_reference(plan, in_weight, out_weight, c);
    free(in);
    free(c);
    free(free_in);
}

int main(int count, char **arguments) {
    static float image[TRAINING + 1000][PIXELS + 1];
    FILE *file = count == 2 ? fopen(arguments[1], "rb") : NULL;
    if (file == NULL) {
        fprintf(stderr, "usage: %s digits.bin (see the beginning of mlp.c)\n", arguments[0]);
        return EXIT_FAILURE;
    }
    int images = (int)fread(image, sizeof *image, TRAINING + 1000, file);
    fclose(file);
    if (images <= TRAINING) {
        fprintf(stderr, "%s: expected more than %d images\n", arguments[1], TRAINING);
        return EXIT_FAILURE;
    }

    ptrdiff_t strides[ARRAYS][2], units, limited;
    gsgd_array weights[ARRAYS], gradients[ARRAYS], moments[ARRAYS];
    gsgd_rates rates[ARRAYS];
    for (int i = 0; i < ARRAYS; i++) {
        ptrdiff_t cols = i % 2 ? 1 : width[i / 2];
        float limit = i % 2 ? 0 : sqrtf(6 / (float)cols);
        for (ptrdiff_t k = 0; k < width[i / 2 + 1] * cols; k++)
            parameter[i][k] = uniform(-limit, limit);
        strides[i][0] = cols;
        strides[i][1] = 1;
        weights[i] = (gsgd_array){parameter[i], strides[i]};
        gradients[i] = (gsgd_array){gradient[i], strides[i]};
        moments[i] = (gsgd_array){momentum[i], strides[i]};
        rates[i] = (gsgd_rates){.method = GSGD_SGD, .momentum = 0.9};
    }
    gsgd_plan *plan = describe(&units);
    begin(plan, units, weights);

    const gsgd_options options = {.rates = rates, .max_ratio = 4, .clip_norm = INFINITY, .threads = 1};
    float loss = 0;
    for (int epoch = 0; epoch < EPOCHS; epoch++) {
        loss = 0;
        for (int i = 0; i < ARRAYS; i++)
            rates[i].lr = 0.04 * (EPOCHS - epoch) / EPOCHS;
        for (int first = 0; first < TRAINING; first += BATCH) {
            for (int i = 0; i < ARRAYS; i++)
                for (ptrdiff_t k = 0; k < width[i / 2 + 1] * strides[i][0]; k++)
                    gradient[i][k] = 0;
            for (int n = first; n < first + BATCH; n++) {
                for (int j = 0; j < PIXELS; j++)
                    value[0][j] = image[n][j];
                forward();
                loss += backward((int)image[n][PIXELS]) / TRAINING;
            }
            int64_t unit;
            check(gsgd_step(plan, weights, gradients, gradients, moments, NULL, &options, &limited, &unit),
                  "gsgd_step");
        }
        int right = 0;
        for (int n = TRAINING; n < images; n++) {
            for (int j = 0; j < PIXELS; j++)
                value[0][j] = image[n][j];
            right += forward() == (int)image[n][PIXELS];
        }
        printf("epoch %2d: loss %.4f, %.1f %% of %d others read\n", epoch + 1, (double)loss,
               100.0 * right / (images - TRAINING), images - TRAINING);
    }
    gsgd_destroy(plan);
    return loss < 0.05 ? EXIT_SUCCESS : EXIT_FAILURE;
}
