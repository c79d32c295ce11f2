// One layer of a model with experts: each row of x computes the experts that its router has picked, and no others. An
// FFN that is not a mixture is computed as one expert that every row picks.
//
// The cells of all picked experts are asked for at once if there are few tokens, else in the order in which they are
// computed. An expert is computed as soon as its cells are here, with all its rows at once, and together with others
// that have few rows. The weighted outputs of a row's experts are added in ascending order of the experts, in fp32. So
// the result of a row depends on that row alone: not on the other rows, on what is in the pool, nor on what arrives
// first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "experts/cell_walk.h"
#include "experts/rank_precision.h"
#include "ffn/ffn.h"
#include "predict/step_times.h"

namespace flashclient {

struct ExpertLayer {
    uint32_t experts;          // 1 for an FFN that is not a mixture
    uint32_t neurons;          // of all of them; the same of each, in whole cells
    const Ffn* ffn = nullptr;  // of this layer; null: that of the step
};

// The rows of a step. Null pointers: there are no picks (every row picks the one expert, with weight 1), or no biases.
struct PickedRows {
    const float* x;  // [tokens, hidden]
    size_t tokens;
    const int64_t* experts;    // [tokens, picks]; outside of the layer's experts, or with weight 0: not computed
    const float* weights;      // [tokens, picks]
    size_t picks;              // of each row
    const float* bias;         // [neurons], as in Neurons
    const float* up_bias;      // [neurons]
    const float* output_bias;  // [experts, hidden], of each expert's output
};

// What the next step may pick. It is read while the device has little else to do, as far as such guesses are right.
struct Guess {
    uint32_t layer = 0;
    // [picks, rows], the likeliest first; what is outside of the layer's experts is left out.
    std::vector<int64_t> experts;
};
using GuessNext = std::function<Guess()>;  // empty: nothing is guessed

class ExpertStep {
  public:
    // All must outlive this. The layers' FFNs are like `ffn`, but for their encodings.
    ExpertStep(const Ffn& ffn, CellWalk& walk, std::vector<ExpertLayer> layers);

    // y [tokens, hidden] = the weighted sum over each row's experts. One thread at a time, which holds walk().use().
    // Calls `guess` after it has asked for the experts, because a guess takes time in which they can be read; not if
    // they are held already, because then the next ones mostly are, too. Throws what `guess` and the walk's source
    // throw; y holds no result then.
    StepTimes run(uint32_t layer, const PickedRows& rows, float* y, const GuessNext& guess = {});
    // What the next run() may pick, guessed from an input that is nearly complete. It takes the place of what was
    // guessed a layer before. Held as run() is.
    void expect(const Guess& guess, size_t rows);
    // Whether the last layer had to ask for experts. If not, the next one mostly needs not, either.
    bool asks() const { return asks_; }

    const ExpertLayer& layer(uint32_t index) const { return layers_.at(index); }
    const Ffn& ffn() const { return ffn_; }  // whose hidden size and number of parts are those of all layers
    CellWalk& walk() const { return walk_; }

  private:
    struct Pick {
        uint32_t token;
        float weight;
    };
    struct Expert {  // one that some row picked
        uint32_t number;
        size_t first_pick;
        size_t picks;
        size_t first_cell;     // index in the walk's list; the next expert's cells follow
        size_t computed;       // cells
        std::vector<float> y;  // [picks, hidden], from its first cell on until it is added
    };

    struct Ready {  // the next cells of an expert, which are here
        Expert* expert;
        size_t cells;
    };

    // The last guess of one kind, and how good those of each layer were.
    struct Guesses {
        Guess last;
        size_t rows = 0;
        std::vector<RankPrecision> precision;
    };

    void pick_all(const ExpertLayer& layer, const PickedRows& rows);
    void sort_picks(const ExpertLayer& layer, const PickedRows& rows);
    std::vector<uint32_t> cells_of_experts();
    void look_ahead(const Guess& guess, size_t rows, Guesses& guesses);
    void judge(uint32_t layer, Guesses& guesses);
    bool picks_nearly_all(const ExpertLayer& layer) const;
    void read_on(uint32_t index);
    size_t cells_of(const ExpertLayer& layer) const;  // of one expert
    bool compute_some(const PickedRows& rows, float* y);
    void find_ready();
    void compute_ready(const PickedRows& rows, float* y);
    Neurons neurons_of(const Ready& ready, const PickedRows& rows);
    const float* rows_of(const Expert& expert, const PickedRows& rows, float* x) const;
    void add_finished(const PickedRows& rows, float* y);
    void add(const Expert& expert, const PickedRows& rows, size_t begin, size_t end, float* y) const;
    bool is_direct(const PickedRows& rows) const { return rows.experts == nullptr && rows.output_bias == nullptr; }
    std::vector<float> zeros(size_t count);

    const Ffn& ffn_;
    CellWalk& walk_;
    std::vector<ExpertLayer> layers_;
    Guesses a_layer_before_, nearly_complete_;  // by what they were made of
    bool asks_ = false;
    // Of the step, kept from call to call because allocating takes long.
    const Ffn* of_layer_ = nullptr;
    size_t neurons_ = 0;           // of an expert
    size_t cells_ = 0;             // of an expert
    std::vector<Expert> experts_;  // ascending
    size_t added_ = 0;             // how many of them y has
    std::vector<Pick> picks_;      // by expert, tokens ascending
    std::vector<size_t> ends_;     // by number of an expert: where its picks end
    std::vector<Ready> ready_;
    std::vector<FfnTerm> terms_;            // what is computed of them
    std::vector<uint64_t> addresses_;       // of their bundles
    std::vector<float> x_;                  // their rows
    std::vector<std::vector<float>> free_;  // memory for Expert::y
};

}  // namespace flashclient
