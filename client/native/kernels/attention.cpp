#include "kernels/attention.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/packed_rows.h"

namespace flashclient {
namespace {

constexpr size_t ROWS_MAX = 16;    // rows of queries in an item: bits of RowSet
constexpr size_t RUN_DOTS = 4096;  // of a run, which stay in the L1 cache
constexpr size_t SHORT_KEY = 64;   // elements in blocks: of such keys kernels multiply several at once
constexpr float MASKED = -std::numeric_limits<float>::infinity();

using RowSet = uint16_t;  // bit r: row r of an item
static_assert(ROWS_MAX <= 8 * sizeof(RowSet) && ROWS_MAX <= TOKENS_MAX);

// Neighbouring keys. for_all: all rows attend to every key. Otherwise some, but not all, rows attend to each key.
struct Run {
    size_t begin;
    size_t count;
    bool for_all;
};

// Calls of_run for each run of keys to which some row attends, in rising order. No `attending`: all attend to each.
template <typename OfRun>
void for_runs(size_t keys, const std::vector<RowSet>& attending, RowSet all, size_t run_max, OfRun&& of_run) {
    size_t begin = 0;
    for (; attending.empty() && begin < keys; begin += run_max) {
        of_run(Run{begin, std::min(run_max, keys - begin), true});
    }
    while (begin < keys) {
        const RowSet rows = attending[begin];
        const size_t limit = rows == 0 ? keys : std::min(keys, begin + run_max);
        size_t end = begin + 1;
        if (rows == 0 || rows == all) {
            while (end < limit && attending[end] == rows) end++;
        } else {
            while (end < limit && attending[end] != 0 && attending[end] != all) end++;
        }
        if (rows != 0) of_run(Run{begin, end - begin, rows == all});
        begin = end;
    }
}

bool has(RowSet rows, size_t row) { return (rows >> row & 1) != 0; }

const char* address_of(const AttentionRows& rows, size_t sequence, size_t head, size_t index) {
    return static_cast<const char*>(rows.data) + sequence * rows.sequence_stride + head * rows.head_stride +
           index * rows.row_stride;
}

}  // namespace

struct Attention::Call {
    const AttentionShape& shape;
    const AttentionRows& query;
    const AttentionRows& key;
    const AttentionRows& value;
    const AttentionMask& mask;
    void* out;
    const Kernels& kernels;  // of keys and values
    size_t key_elements;     // of a row, with the zeros that make whole blocks
    size_t value_elements;
    bool keys_are_matrix;  // that add_products() takes

    float score(float dot) const;
    float bias(const Item& item, size_t row, size_t index) const;
    size_t weights() const { return shape.keys + (shape.sinks == nullptr ? 0 : 1); }  // of a row at most
    size_t group() const { return shape.heads / shape.key_heads; }
    size_t rows() const { return group() * shape.tokens; }  // rows of queries that share a head of keys
    size_t items_of_head() const { return (rows() + ROWS_MAX - 1) / ROWS_MAX; }
};

struct Attention::Item {
    size_t sequence;
    size_t key_head;
    size_t first;  // row: token after token, the heads of a group side by side
    size_t count;
    RowSet all;

    Item(const Call& call, size_t index) {
        const size_t of_head = call.items_of_head();
        first = index % of_head * ROWS_MAX;
        key_head = index / of_head % call.shape.key_heads;
        sequence = index / of_head / call.shape.key_heads;
        count = std::min(ROWS_MAX, call.rows() - first);
        all = static_cast<RowSet>((1U << count) - 1);
    }
    size_t token(const Call& call, size_t row) const { return (first + row) / call.group(); }
    size_t head(const Call& call, size_t row) const { return key_head * call.group() + (first + row) % call.group(); }
    size_t mask_offset(const Call& call, size_t row) const {
        const AttentionMask& mask = call.mask;
        return sequence * mask.sequence_stride + head(call, row) * mask.head_stride +
               token(call, row) * mask.token_stride;
    }
};

float Attention::Call::score(float dot) const {
    const float score = dot * shape.scale;
    return shape.softcap == 0.0f ? score : shape.softcap * std::tanh(score / shape.softcap);
}

// What the mask adds to a score. Adding 0 changes no bit of a finite one but the sign of zero.
float Attention::Call::bias(const Item& item, size_t row, size_t index) const {
    if (mask.kind != AttentionMask::Kind::additive) return 0.0f;
    return static_cast<const float*>(mask.data)[item.mask_offset(*this, row) + index * mask.key_stride];
}

// Each thread keeps one, because allocating takes longer than an item.
struct Attention::Scratch {
    std::vector<RowSet> attending;  // by key; empty where all rows attend to each
    std::vector<float> weights;     // [rows, weights()]: of the keys that a row attends to, side by side, then the sink
    std::vector<float> query;       // [rows, key_elements]
    std::vector<float> sums;        // [rows, value_elements]
    float total[ROWS_MAX];          // the sum of the weights of a row
    const void* rows[RUN_DOTS];     // keys or values of a run
    float dots[RUN_DOTS];           // [keys, rows] of a run

    void prepare(const Call& call, const Item& item) {
        attending.assign(call.mask.kind == AttentionMask::Kind::none ? 0 : call.shape.keys, RowSet{0});
        if (call.mask.kind == AttentionMask::Kind::causal) add_causal_rows(call, item);
        weights.resize(std::max(weights.size(), item.count * call.weights()));
        query.assign(item.count * call.key_elements, 0.0f);
        sums.assign(item.count * call.value_elements, 0.0f);
        for (size_t r = 0; r < item.count; r++) add_mask_row(call.mask, item.mask_offset(call, r), r);
    }

  private:
    void add_causal_rows(const Call& call, const Item& item) {
        size_t begin = 0;  // rows are in order of their tokens
        for (size_t r = 0; r < item.count; r++) {
            const size_t end = std::min(item.token(call, r) + 1, attending.size());
            const auto from_here = static_cast<RowSet>(item.all >> r << r);
            for (size_t i = begin; i < end; i++) attending[i] = from_here;
            begin = end;
        }
    }
    void add_mask_row(const AttentionMask& mask, size_t offset, size_t row) {
        if (mask.kind == AttentionMask::Kind::boolean) {
            add_row(static_cast<const uint8_t*>(mask.data) + offset, mask.key_stride, uint8_t{0}, row);
        } else if (mask.kind == AttentionMask::Kind::additive) {
            add_row(static_cast<const float*>(mask.data) + offset, mask.key_stride, MASKED, row);
        }
    }
    template <typename Value>
    void add_row(const Value* values, size_t stride, Value masked, size_t row) {
        RowSet* sets = attending.data();
        const size_t keys = attending.size();
        if (stride == 1) {  // a loop of its own, for vectors
            for (size_t i = 0; i < keys; i++) sets[i] |= static_cast<RowSet>((values[i] != masked) << row);
        } else {
            for (size_t i = 0; i < keys; i++) {
                sets[i] |= static_cast<RowSet>((values[i * stride] != masked) << row);
            }
        }
    }
};

Attention::Attention(Workers& workers, Dtype dtype, const char* instruction_set)
    : workers_(workers),
      dtype_(dtype),
      kernels_(kernels_for(dtype, instruction_set)),
      of_blocks_(kernels_for(BLOCKS, instruction_set)) {}

void Attention::attend(const AttentionShape& shape, const AttentionRows& query, const AttentionRows& key,
                       const AttentionRows& value, const AttentionMask& mask, void* out) const {
    assert(shape.key_heads > 0 && shape.heads % shape.key_heads == 0);
    const auto elements = [&](size_t count) { return shape.in_blocks ? whole_blocks(count) : count; };
    const Kernels& kernels = shape.in_blocks ? of_blocks_ : kernels_;
    const size_t of_key = elements(shape.key_elements);
    const bool back_to_back = shape.in_blocks && key.row_stride == block_row_bytes(of_key);
    const bool short_keys = of_key == SHORT_KEY || of_key == SHORT_KEY / 2;
    const Call call{shape,
                    query,
                    key,
                    value,
                    mask,
                    out,
                    kernels,
                    of_key,
                    elements(shape.value_elements),
                    back_to_back && short_keys};
    const size_t items = shape.sequences * shape.key_heads * call.items_of_head();
    workers_.run(items, [&](size_t index) {
        const size_t next = index + workers_.threads();  // most likely this thread's
        attend_item(call, Item(call, index), next < items ? Item(call, next) : Item(call, index));
    });
}

void Attention::attend_item(const Call& call, const Item& item, const Item& next) const {
    static thread_local Scratch scratch;
    scratch.prepare(call, item);
    weigh(call, item, scratch);
    const bool other_keys = next.key_head != item.key_head || next.sequence != item.sequence;
    if (other_keys && scratch.attending.empty()) {
        fetch_rows(call, next, call.key, call.key_elements, scratch);
    }
    blend(call, item, scratch);
    const size_t elements = call.shape.value_elements;
    for (size_t r = 0; r < item.count; r++) {
        const size_t token = item.sequence * call.shape.tokens + item.token(call, r);
        const size_t offset = (token * call.shape.heads + item.head(call, r)) * elements;
        const float total = scratch.total[r] == 0.0f ? 1.0f : scratch.total[r];
        float* sums = scratch.sums.data() + r * call.value_elements;
        for (size_t j = 0; j < elements; j++) sums[j] /= total;
        kernels_.downcast(sums, elements, static_cast<char*>(call.out) + offset * bytes_of(dtype_));
    }
}

// scratch.weights = exp(cap(scale * q . k) + mask - the greatest of them), scratch.total = their sum.
void Attention::weigh(const Call& call, const Item& item, Scratch& scratch) const {
    const AttentionShape& shape = call.shape;
    for (size_t r = 0; r < item.count; r++) {
        kernels_.upcast(address_of(call.query, item.sequence, item.head(call, r), item.token(call, r)),
                        shape.key_elements, scratch.query.data() + r * call.key_elements);
    }
    const PackedRows packed(workers_, call.kernels, scratch.query.data(), call.keys_are_matrix ? 0 : item.count,
                            call.key_elements);
    size_t filled[ROWS_MAX] = {};
    for_runs(shape.keys, scratch.attending, item.all, RUN_DOTS / item.count, [&](const Run& run) {
        multiply(call, item, run.begin, run.count, packed, scratch);
        const size_t of_row = call.keys_are_matrix ? run.count : 1, of_key = call.keys_are_matrix ? 1 : item.count;
        for (size_t r = 0; r < item.count; r++) {
            const float* dots = scratch.dots + r * of_row;
            float* weights = scratch.weights.data() + r * call.weights() + filled[r];
            if (run.for_all && call.mask.kind != AttentionMask::Kind::additive) {
                if (shape.softcap == 0.0f) {  // a loop of its own, for vectors
                    for (size_t k = 0; k < run.count; k++) weights[k] = dots[k * of_key] * shape.scale;
                } else {
                    for (size_t k = 0; k < run.count; k++) weights[k] = call.score(dots[k * of_key]);
                }
                filled[r] += run.count;
                continue;
            }
            for (size_t k = 0; k < run.count; k++) {
                if (!has(scratch.attending[run.begin + k], r)) continue;
                *weights++ = call.score(dots[k * of_key]) + call.bias(item, r, run.begin + k);
                filled[r]++;
            }
        }
    });
    fetch_rows(call, item, call.value, call.value_elements, scratch);
    for (size_t r = 0; r < item.count; r++) {
        float* weights = scratch.weights.data() + r * call.weights();
        if (shape.sinks != nullptr) weights[filled[r]++] = shape.sinks[item.head(call, r)];
        scratch.total[r] = filled[r] == 0 ? 0.0f : kernels_.exponentials(weights, filled[r]);
    }
}

// scratch.dots = q . k of `count` keys: [keys, rows], or [rows, keys] where these are a matrix.
void Attention::multiply(const Call& call, const Item& item, size_t first, size_t count, const PackedRows& query,
                         Scratch& scratch) {
    const char* keys = address_of(call.key, item.sequence, item.key_head, first);
    if (call.keys_are_matrix) {
        std::fill_n(scratch.dots, item.count * count, 0.0f);
        call.kernels.add_products(keys, call.key_elements, scratch.query.data(), call.key_elements, item.count, count,
                                  0, count, scratch.dots);
        return;
    }
    for (size_t k = 0; k < count; k++) scratch.rows[k] = keys + k * call.key.row_stride;
    call.kernels.dots(scratch.rows, count, query.group(0), call.key_elements, item.count, scratch.dots);
}

// Fetches the first rows of a head to which some row attends.
void Attention::fetch_rows(const Call& call, const Item& item, const AttentionRows& rows, size_t elements,
                           const Scratch& scratch) const {
    const size_t row_bytes = call.shape.in_blocks ? block_row_bytes(elements) : elements * bytes_of(dtype_);
    size_t fetched = 0;
    for (size_t i = 0; i < call.shape.keys && fetched < FETCHED_BYTES; i++) {
        if (!scratch.attending.empty() && scratch.attending[i] == 0) continue;
        fetch_lines(address_of(rows, item.sequence, item.key_head, i), row_bytes);
        fetched += row_bytes;
    }
}

// scratch.sums[r] += weight * value, in the order of the keys. Where not all rows attend, each row is summed alone,
// because a masked value that is not finite would spoil a sum even with weight 0.
void Attention::blend(const Call& call, const Item& item, Scratch& scratch) const {
    const AttentionShape& shape = call.shape;
    const size_t elements = call.value_elements;
    const float* next[ROWS_MAX];
    for (size_t r = 0; r < item.count; r++) next[r] = scratch.weights.data() + r * call.weights();
    for_runs(shape.keys, scratch.attending, item.all, RUN_DOTS / item.count, [&](const Run& run) {
        const void** values = scratch.rows;
        if (run.for_all) {
            const char* first = address_of(call.value, item.sequence, item.key_head, run.begin);
            for (size_t k = 0; k < run.count; k++) values[k] = first + k * call.value.row_stride;
            const float* weights = next[0];
            if (item.count > 1) {
                for (size_t r = 0; r < item.count; r++) {
                    for (size_t k = 0; k < run.count; k++) scratch.dots[k * item.count + r] = next[r][k];
                }
                weights = scratch.dots;
            }
            call.kernels.accumulate(values, weights, run.count, item.count, elements, 0, elements, scratch.sums.data());
            for (size_t r = 0; r < item.count; r++) next[r] += run.count;
            return;
        }
        for (size_t r = 0; r < item.count; r++) {
            size_t count = 0;
            for (size_t k = 0; k < run.count; k++) {
                if (has(scratch.attending[run.begin + k], r)) {
                    values[count++] = address_of(call.value, item.sequence, item.key_head, run.begin + k);
                }
            }
            call.kernels.accumulate(values, next[r], count, 1, elements, 0, elements,
                                    scratch.sums.data() + r * elements);
            next[r] += count;
        }
    });
}

}  // namespace flashclient
