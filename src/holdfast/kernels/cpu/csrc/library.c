// What Python calls. Everything else is hidden.
#include <stddef.h>

#include "exchange.h"
#include "pack.h"
#include "team.h"

#define EXPORT __attribute__((visibility("default")))

#if defined(__x86_64__)
extern const struct isa isa_avx512bf16, isa_avx512, isa_avx2;
#endif
extern const struct isa isa_portable;

static const struct isa *const isas[] = {
#if defined(__x86_64__)
    &isa_avx512bf16, &isa_avx512, &isa_avx2,
#endif
    &isa_portable,
};

// Build `index` (best first), or NULL; its name; whether this processor runs it; whether linear takes bf16 rows.
EXPORT const struct isa *holdfast_isa(int64_t index) {
    return index < (int64_t)(sizeof isas / sizeof *isas) ? isas[index] : NULL;
}
EXPORT const char *holdfast_isa_name(const struct isa *isa) { return isa->name; }
EXPORT int64_t holdfast_isa_supported(const struct isa *isa) { return isa->supported() != 0; }
EXPORT int64_t holdfast_isa_dots_bf16(const struct isa *isa) { return isa->dots_bf16; }

EXPORT struct team *holdfast_team_start(int64_t threads, const int64_t *cpus) { return team_start(threads, cpus); }
EXPORT void holdfast_team_stop(struct team *team) { team_stop(team); }
EXPORT void holdfast_run(
    struct team *team, const struct isa *isa, const struct op *ops, int64_t count, const struct batch *batch
) {
    team_run(team, isa, ops, count, batch);
}

EXPORT void holdfast_give_up(uint32_t *aborted, struct counter *counters, int64_t count) { give_up(aborted, counters, count); }

EXPORT void holdfast_pack_dense(const struct weight *w, const void *rows, int64_t stride, int64_t half) {
    pack_dense(w, rows, stride, half);
}
EXPORT void holdfast_pack_groups(const struct weight *w, const uint8_t *rows, int64_t row_bytes, int64_t half) {
    pack_groups(w, rows, row_bytes, half);
}

// The constants that Python repeats, in the order of CONSTANTS; -1 after the last.
EXPORT int64_t holdfast_constant(int64_t index) {
#define VALUE(name) name,
    static const int64_t values[] = {CONSTANTS(VALUE)};
#undef VALUE
    return index < (int64_t)(sizeof values / sizeof *values) ? values[index] : -1;
}

// Bytes of the structs that Python mirrors: batch, weight, op, those of exchanges, then of each kind of operation.
EXPORT int64_t holdfast_struct_bytes(int64_t index) {
#define BYTES(name) sizeof(((struct op *)0)->name),
    static const int64_t bytes[] = {sizeof(struct batch), sizeof(struct weight), sizeof(struct op), sizeof(struct counter),
                                    sizeof(struct tally), sizeof(struct endpoint), sizeof(struct slots), OPERATIONS(BYTES)};
#undef BYTES
    return index < (int64_t)(sizeof bytes / sizeof *bytes) ? bytes[index] : -1;
}
