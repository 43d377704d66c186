// The step program: a list of operations that a team of threads runs in order. Filled in by Python through ctypes
// (kernels/cpu/structs.py mirrors every struct here, and checks their sizes when the library is loaded).
//
// Shapes: T rows (tokens) of the step, B requests, H query heads, G KV heads, D head dim, S tokens per block.
#pragma once
#include <stdint.h>

// What Python must know too; it checks them like the structs.
#define CONSTANTS(X) X(PANEL) X(GROUP) X(TILE_TOKENS) X(SPLIT) X(MAX_HEAD_DIM)
#define PANEL 32        // columns of a panel of weights
#define GROUP 32        // numbers of a quantized row that share a scale
#define TILE_TOKENS 16  // of an item of attention
#define SPLIT 1024      // keys after which attention puts its state aside
#define MAX_HEAD_DIM 512

enum dtype { F32, BF16, I8 };
enum weight_format { W_F32, W_BF16, W_Q8, W_Q4, W_Q4_MIN };  // Q8_0, Q4_0 and Q4_1 of GGUF
enum activation { ACT_NONE, ACT_SILU, ACT_GELU, ACT_GELU_TANH, ACT_RELU };

// T rows of numbers; row t starts at data + t * stride elements.
struct rows {
    void *data;
    int64_t stride;
    int64_t dtype;
};

// One step, the same for all its operations.
struct batch {
    int64_t rows;                 // T
    int64_t requests;             // B
    const int64_t *positions;     // [T]
    const int64_t *slots;         // [T]: block * S + offset
    const int32_t *query_starts;  // [B + 1]: rows of request b are query_starts[b] … query_starts[b + 1] - 1
    const int32_t *context_lens;  // [B]
    const int32_t *tables;        // [B, table_width] block ids
    int64_t table_width;
    const int32_t *items;         // [B + 1]: attention's items of request b, see attention.inc
    const int64_t *failed;        // the run ends once this is not 0; or NULL
    int64_t *moves;               // counts pieces of work done by the caller, for whoever watches; or NULL
};

// A matrix [N, K], read by panels of 32 of its rows (output columns), K in order within a panel. A panel of
//   W_F32:  [K][32] floats
//   W_BF16: [K / 2][32][2], two neighbours in K together; an odd K ends in a pair whose second is 0
//   W_Q8, W_Q4, W_Q4_MIN: K / 32 groups, see groups.inc
// The last panel is filled up with zeros. `gated`: panels come in pairs, gate then up.
struct weight {
    const void *data;
    const float *bias;      // [panels * 32] or NULL
    const int64_t *shards;  // ends of the virtual shards of K (the last is K), or NULL for one; see linear.inc
    int64_t n, k;           // n: of one half if gated
    int64_t panel_bytes;
    int64_t format;
    int64_t num_shards;
    int64_t activation;
    int64_t gated;
};

// y = activation(x · wᵀ + bias), or y += it. With `offsets` the rows belong to groups, one weight each: group g
// has rows offsets[g] … offsets[g + 1] - 1 (experts).
struct linear_op {
    struct rows x, y;
    const struct weight *weights;
    const int64_t *offsets;
    int64_t groups;
    const float *factors;  // of quantized rows x, for weights in groups: see quantize
    int64_t digits;        // of such rows
    int64_t add;
};

// Rows x [T · per_row, k] in groups of 32: codes y of one or two digits of 8 bits, all the high ones [k] before all the
// low ones, `offset` (0 or 128) more than they stand for; and factors [T · per_row, k / 32, 2], for each group its scale
// and the sum of its numbers.
struct quantize_op {
    struct rows x, y;
    float *factors;
    int64_t k;
    int64_t per_row;
    int64_t offset;
    int64_t digits;
};

// y = table[ids + offset] * scale, or y += it; y is float32. Rows the table does not have are zeros (they are another
// rank's), and -0 becomes 0, so that the sum over all ranks has the bits of a single one.
struct embedding_op {
    const int64_t *ids;
    const struct weight *table;
    struct rows y;
    int64_t offset;
    int64_t add;
    float scale;
};

// RMS norm, or layer norm where centered; y = it, or y += it. weight and bias are float32 [width].
struct norm_op {
    struct rows x, y;
    const float *weight, *bias;
    int64_t width;
    int64_t centered;
    int64_t add;
    float eps;
};

struct convert_op {
    struct rows x, y;
    int64_t width;
};

// x = tanh(x / cap) * cap.
struct softcap_op {
    struct rows x;
    int64_t width;
    float cap;
};

// KV pages [P, G, S, D]; see pages.inc for the order of the numbers within a cell.
struct pages {
    void *k, *v;
    int64_t kv_heads, block_size, head_dim;
    int64_t dtype;
};

// Split qkv [T, (H + 2G) · D]: norm and rotate q in place, norm and rotate k into its page, v into its page.
struct store_kv_op {
    struct rows qkv;
    struct pages pages;
    const float *q_norm, *k_norm;  // [D] or NULL
    const float *cos_sin;          // [positions][2][rotary / 2] or NULL
    int64_t heads, rotary;
    float eps;
};

struct attention_op {
    struct rows q, y;  // [T, H · D]
    struct pages pages;
    const float *alibi;  // [H] or NULL
    int64_t heads;
    int64_t window;  // 0: none
    float scale, softcap;  // softcap 0: none
    float *partial;        // room for states of splits, see attention.inc
};

// Router logits [T, E] → the K best experts of each row, ascending, and their shares.
struct route_op {
    struct rows logits;
    int64_t *ids;   // [T, K]
    float *shares;  // [T, K]
    int64_t experts, chosen;
    int64_t renormalize;
};

// Groups of ranks that compute experts: row t of expert e is group table[t % turns, e]'s. Without a table all are ours.
struct owners {
    const int64_t *table;
    int64_t turns, experts;
};

// Sort the T · K (row, expert) pairs by expert: offsets [E + 1], `sources` [T · K] the row of each sorted place,
// `places` [T, K] the sorted place of each pair. With owners, only the pairs that are `self`'s; places that are left over
// have row 0. Both counts are optional: of pairs by expert, `chosen_counts` [E], whoever's; and how many were ours.
struct sort_op {
    const int64_t *ids;
    struct owners owners;
    int64_t *offsets, *sources, *places;
    int64_t experts, chosen, self;
    int64_t *chosen_counts, *own_count;
};

// y[i] = x[sources[i]] for T · K rows.
struct gather_op {
    struct rows x, y;
    const int64_t *sources;
    int64_t width, chosen;
};

// y[t] += Σ shares[t, i] · x[places[t, i]], in order of i; or = where not add.
struct combine_op {
    struct rows x, y;  // x float32 [T · K, width]
    const int64_t *places;
    const float *shares;
    int64_t width, chosen;
    int64_t add;
};

// --- between processes, see exchange.inc ---

// In shared memory: how often somebody has done something, and who sleeps until he does it again.
struct counter {
    _Alignas(64) uint32_t count;
    uint32_t sleepers;
};

// In shared memory, one per rank: what it has exchanged.
struct tally {
    _Alignas(64) int64_t exchanges;
    int64_t bytes_read;  // of other ranks' numbers
    int64_t waited_ns;   // for them, in collectives
    int64_t idle_ns;     // for the stage before, or for room in the next
    int64_t steps, step_ns;  // kept by Python: all of a step, waits included
    int64_t expert_rows;     // through this rank's experts
    int64_t moves;           // pieces of work done: while it grows, the rank does not hang
};

// One process's end of all exchanges.
struct endpoint {
    const uint32_t *aborted;  // shared: no exchange goes on
    struct tally *tally;
    int64_t timeout_ns;       // of a single wait
    int64_t failed;           // FAILED_…; what is left of a program is not run then
};
enum { FAILED_NOT, FAILED_ABORTED, FAILED_LATE };

// Numbers in shared memory that change hands again and again. The current exchange is number `clock` + `ahead`;
// its numbers lie at data + number % depth * slot_bytes.
struct slots {
    char *data;
    int64_t slot_bytes, depth;
    const struct counter *clock;
    int64_t ahead;
};

// Count `own` up, if there is one; then wait until each of `others` has reached clock + ahead.
struct meet_op {
    struct endpoint *end;
    struct counter *own;
    struct counter *const *others;
    int64_t num_others;
    const struct counter *clock;
    int64_t ahead;
    int64_t idle;  // what is waited for: a stage, or (0) the ranks of one's own
};

// Take at least so long: for measuring a pipeline instead of the processor.
struct pause_op {
    int64_t ns, row_ns;
};

// Rows from x into shared memory, or (`take`) the other way: float32 [T, width], those from T · part / parts on.
struct move_op {
    struct rows x;
    struct slots slots;
    struct tally *tally;
    int64_t width;
    int64_t part, parts;
    int64_t take;
};

// y = the sum of what all ranks have put into shared memory (+ bias), or y += it. Piece i [T, width] lies in
// sources[i]; after it, joins[i] times the two latest sums become one: the binary tree of the virtual shards.
struct join_op {
    struct rows y;
    const struct slots *sources;
    const int64_t *joins;
    int64_t pieces;
    int64_t others;  // pieces, of them, that are other ranks'
    struct tally *tally;
    const float *bias;
    int64_t width;
    int64_t add;
};

// y[T, starts[ranks]] = what all ranks have put into shared memory, side by side: rank r has [T, starts[r + 1] - starts[r]].
struct collect_op {
    struct rows y;
    const struct slots *sources;
    const int64_t *starts;
    int64_t ranks, self;
    struct tally *tally;
};

// What this rank's experts have given, into shared memory: row places[t, i] of x for each pair (t, i) that is its own.
struct deal_op {
    struct rows x;  // float32 [T · K, width]
    struct slots slots;
    const int64_t *ids, *places;
    struct owners owners;
    int64_t width, chosen;
    int64_t self;
};

// combine, over experts of several groups of ranks: what pair (t, i) gives lies in rows t · K + i of the `pieces` sources
// of the group that owns the pair, and is joined like those of join_op.
struct reunite_op {
    struct rows y;
    const struct slots *sources;  // [groups][pieces]
    const int64_t *is_mine;       // [groups][pieces]
    const int64_t *joins;         // [pieces]
    const int64_t *ids;
    struct owners owners;
    const float *shares;
    int64_t width, chosen;
    int64_t pieces;
    struct tally *tally;
    int64_t add;
};

// chosen[t] = the id of the largest of logits[t], the lowest among equals.
struct argmax_op {
    struct rows logits;
    int64_t *chosen;
    int64_t width;
};

// logits[t] += Gumbel noise of (seeds[t], positions[t], id).
struct noise_op {
    struct rows logits;
    const int64_t *seeds, *positions;
    int64_t width;
};

// Set what is outside min_p, top_k, top_p to -inf.
struct filter_op {
    struct rows logits;
    const int64_t *top_k;
    const float *top_p, *min_p;
    int64_t width;
};

#define OPERATIONS(X)                                                                                               \
    X(linear) X(quantize) X(embedding) X(norm) X(convert) X(softcap) X(store_kv) X(attention) X(merge) X(route)   \
    X(sort) X(gather) X(combine) X(argmax) X(noise) X(filter) X(meet) X(move) X(join) X(collect) X(deal) X(reunite) X(pause)

#define KIND(name) OP_##name,
enum op_kind { OPERATIONS(KIND) OP_COUNT };
#undef KIND

struct op {
    int64_t kind;
    union {
        struct linear_op linear;
        struct quantize_op quantize;
        struct embedding_op embedding;
        struct norm_op norm;
        struct convert_op convert;
        struct softcap_op softcap;
        struct store_kv_op store_kv;
        struct attention_op attention, merge;
        struct route_op route;
        struct sort_op sort;
        struct gather_op gather;
        struct combine_op combine;
        struct argmax_op argmax;
        struct noise_op noise;
        struct filter_op filter;
        struct meet_op meet;
        struct move_op move;
        struct join_op join;
        struct collect_op collect;
        struct deal_op deal;
        struct reunite_op reunite;
        struct pause_op pause;
    };
};

// What an operation is cut into, and how a range of these units is computed. Units may run in any order, on any
// thread; no number depends on how they are cut.
typedef int64_t units_fn(const struct op *op, const struct batch *batch);
typedef void run_fn(const struct op *op, const struct batch *batch, int64_t first, int64_t last);

// One instruction set's build of every operation.
struct isa {
    const char *name;
    int (*supported)(void);
    int64_t dots_bf16;  // whether linear takes bf16 rows; elsewhere they are converted to float32 before
    units_fn *units[OP_COUNT];
    run_fn *run[OP_COUNT];
};
