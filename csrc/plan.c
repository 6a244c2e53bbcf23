/* plan.c - plans: a network's blocks as they were described, and memory for all calls. */
#include "plan.h"

#include <stdlib.h>
#include <string.h>

void gsgd_destroy(gsgd_plan *plan) {
    if (plan == NULL)
        return;
    for (ptrdiff_t k = 0; plan->block != NULL && k < plan->blocks; ++k) {
        free(plan->block[k].row_unit);
        free(plan->block[k].column_sum);
        free(plan->block[k].place);
    }
    free(plan->type);
    free(plan->has_gradient);
    free(plan->block);
    free(plan->order);
    free(plan->in);
    free(plan->in_unit);
    free(plan->active);
    free(plan->memory);
    free(plan);
}

/* Copy a description. */
static gsgd_status take_block(block *to, const gsgd_block *from, ptrdiff_t units, ptrdiff_t arrays,
                              const gsgd_type *types) {
    if (from->array < 0 || from->array >= arrays)
        return GSGD_BAD_BLOCK;
    memcpy(to->dim, from->dim, sizeof to->dim);
    to->array = from->array;
    to->type = types[from->array];
    to->start_axis = from->start_axis;
    to->start = from->start;
    to->groups = from->dim[GSGD_GROUP].extent;
    to->rows = from->dim[GSGD_ROW].extent;
    to->cols = from->dim[GSGD_COL].extent;
    to->taps = 1;
    for (int d = GSGD_TAP; d < GSGD_NDIM; ++d)
        to->taps *= from->dim[d].extent;

    ptrdiff_t num_rows = to->groups * to->rows, num_cols = to->groups * to->cols;
    for (ptrdiff_t j = 0; j < num_cols; ++j)
        to->gathers |= from->col_unit[j] != GSGD_PINNED;
    ptrdiff_t lines = num_cols * to->taps, gathered = to->gathers ? lines : 0;
    ptrdiff_t places = to->taps > 1 ? to->cols * to->taps : 0;
    to->row_unit = malloc((size_t)(num_rows + 2 * num_cols + 1) * sizeof(int64_t));
    to->column_sum = malloc((size_t)(4 * gathered + lines + 2 * num_rows + 1) * sizeof(double));
    to->place = calloc((size_t)(2 * places + 1), sizeof(ptrdiff_t));
    if (to->row_unit == NULL || to->column_sum == NULL || to->place == NULL)
        return GSGD_NO_MEMORY;
    to->unplace = to->place + places;
    to->col_unit = to->row_unit + num_rows;
    to->col_root = to->col_unit + num_cols;
    to->line_a = to->column_sum + gathered;
    to->line_inv_a = to->column_sum + 2 * gathered;
    to->line_inv_rho = to->column_sum + 3 * gathered;
    to->column_square = to->column_sum + 4 * gathered;
    to->row_b = to->column_square + lines;
    to->row_inv_b = to->column_square + lines + num_rows;
    if (num_rows)
        memcpy(to->row_unit, from->row_unit, (size_t)num_rows * sizeof(int64_t));
    if (num_cols)
        memcpy(to->col_unit, from->col_unit, (size_t)num_cols * sizeof(int64_t));
    for (ptrdiff_t i = 0; i < num_rows + num_cols; ++i)
        if (to->row_unit[i] < GSGD_PINNED || to->row_unit[i] >= units)
            return GSGD_BAD_BLOCK;
    return GSGD_OK;
}

enum { OWN_ROWS = 8 }; /* arrays of double over units besides those of gather and solve */

gsgd_status gsgd_create(gsgd_plan **out, ptrdiff_t units, ptrdiff_t arrays, const gsgd_type *types,
                        ptrdiff_t blocks, const gsgd_block *source) {
    *out = NULL;
    gsgd_plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL)
        return GSGD_NO_MEMORY;
    size_t n = (size_t)units + 1;
    plan->units = units;
    plan->arrays = arrays;
    plan->blocks = blocks;
    plan->type = calloc((size_t)arrays + 1, sizeof *plan->type);
    plan->has_gradient = calloc(2 * (size_t)arrays + 1, 1);
    plan->block = calloc((size_t)blocks + 1, sizeof *plan->block);
    plan->order = calloc((size_t)blocks + 1, sizeof *plan->order);
    plan->in = calloc(2 * n, sizeof *plan->in);
    plan->in_unit = calloc(6 * n, sizeof *plan->in_unit);
    plan->active = calloc(2 * n, 1);
    plan->memory = calloc((OWN_ROWS + GSGD_GATHERED + GSGD_SOLVED) * n, sizeof *plan->memory);
    if (!plan->type || !plan->has_gradient || !plan->block || !plan->order || !plan->in || !plan->in_unit ||
        !plan->active || !plan->memory) {
        gsgd_destroy(plan);
        return GSGD_NO_MEMORY;
    }
    if (arrays)
        memcpy(plan->type, types, (size_t)arrays * sizeof *types);
    plan->has_m = plan->has_gradient + arrays;
    plan->out = plan->in + n;
    plan->out_unit = plan->in_unit + n;
    plan->in_array = plan->in_unit + 2 * n;
    plan->root = plan->in_unit + 3 * n;
    plan->in_order = plan->in_unit + 4 * n;
    plan->out_order = plan->in_unit + 5 * n;
    plan->in_is_free = plan->active + n;
    double **own[OWN_ROWS] = {&plan->in0,  &plan->out0, &plan->c,     &plan->to_a,
                              &plan->to_b, &plan->x,    &plan->inv_x, &plan->ratio};
    for (size_t i = 0; i < OWN_ROWS; ++i)
        *own[i] = plan->memory + i * n + 1;
    plan->to_a[-1] = plan->to_b[-1] = 1;
    plan->gathered = plan->memory + OWN_ROWS * n;
    plan->solved = plan->gathered + GSGD_GATHERED * n;

    for (ptrdiff_t k = 0; k < blocks; ++k) {
        gsgd_status status = take_block(&plan->block[k], &source[k], units, arrays, types);
        if (status != GSGD_OK) {
            gsgd_destroy(plan);
            return status;
        }
        const block *b = &plan->block[k];
        plan->entries += b->groups * b->rows * b->cols * b->taps;
    }
    *out = plan;
    return GSGD_OK;
}
