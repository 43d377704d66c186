#pragma once
#include "ops.h"

// Rows [n, k] of float or bf16 (as w->format), `stride` elements apart, into the panels of w. half: 0, or 1 for the
// second matrix of a gated pair.
void pack_dense(const struct weight *w, const void *rows, int64_t stride, int64_t half);

// The same for rows of GGUF blocks of the kind of w->format.
void pack_groups(const struct weight *w, const uint8_t *rows, int64_t row_bytes, int64_t half);
