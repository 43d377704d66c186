// From a matrix by rows to panels (see struct weight in ops.h). Runs once, while weights are loaded.
#include "pack.h"

#include <string.h>

static char *panel_of(const struct weight *w, int64_t panel, int64_t half) {
    return (char *)(uintptr_t)w->data + (panel * (1 + w->gated) + half) * w->panel_bytes;
}

void pack_dense(const struct weight *w, const void *rows, int64_t stride, int64_t half) {
    int64_t whole[] = {w->k}, count = w->shards ? w->num_shards : 1;
    const int64_t *ends = w->shards ? w->shards : whole;
    for (int64_t panel = 0; panel * PANEL < w->n; panel++) {
        char *out = panel_of(w, panel, half);
        memset(out, 0, (size_t)w->panel_bytes);
        int64_t columns = w->n - panel * PANEL < PANEL ? w->n - panel * PANEL : PANEL;
        for (int64_t shard = 0, from = 0; shard < count; from = ends[shard++]) {
            int64_t k = ends[shard] - from, steps = w->format == W_F32 ? k : (k + 1) / 2;
            for (int64_t c = 0; c < columns; c++) {
                int64_t at = (panel * PANEL + c) * stride + from;
                if (w->format == W_F32) {
                    for (int64_t i = 0; i < k; i++) ((float *)out)[i * PANEL + c] = ((const float *)rows)[at + i];
                } else {
                    for (int64_t i = 0; i < k; i++)
                        ((uint16_t *)out)[(i / 2 * PANEL + c) * 2 + i % 2] = ((const uint16_t *)rows)[at + i];
                }
            }
            out += steps * PANEL * 4;
        }
    }
}

// The code of number i of a GGUF block: Q8_0 [half scale][32 int8]; Q4_0 [half scale], Q4_1 [half scale][half minimum],
// then [16] bytes with number i in the lower and i + 16 in the upper four bits.
static int block_code(int64_t format, const uint8_t *block, int64_t i) {
    if (format == W_Q8) return block[2 + i];
    const uint8_t *codes = block + (format == W_Q4_MIN ? 4 : 2);
    return i < 16 ? codes[i] & 15 : codes[i - 16] >> 4;
}

void pack_groups(const struct weight *w, const uint8_t *rows, int64_t row_bytes, int64_t half) {
    int64_t groups = w->k / GROUP, block_bytes = row_bytes / groups, bytes = w->panel_bytes / groups;
    int64_t codes = w->format == W_Q8 ? 1024 : 512;
    for (int64_t panel = 0; panel * PANEL < w->n; panel++) {
        char *out = panel_of(w, panel, half);
        memset(out, 0, (size_t)w->panel_bytes);
        int64_t columns = w->n - panel * PANEL < PANEL ? w->n - panel * PANEL : PANEL;
        for (int64_t g = 0; g < groups; g++, out += bytes)
            for (int64_t c = 0; c < columns; c++) {
                const uint8_t *block = rows + (panel * PANEL + c) * row_bytes + g * block_bytes;
                memcpy(out + codes + 2 * c, block, 2);
                if (w->format == W_Q4_MIN) memcpy(out + codes + 64 + 2 * c, block + 2, 2);
                for (int64_t i = 0; i < GROUP; i++) {
                    int code = block_code(w->format, block, i);
                    int64_t four = i / 4, row = w->format == W_Q8 ? four : four % 4;
                    ((uint8_t *)out)[(row * PANEL + c) * 4 + i % 4] |= (uint8_t)(row == four ? code : code << 4);
                }
            }
    }
}
