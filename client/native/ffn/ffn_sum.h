// The sum over all neurons of an FFN layer, which come in chunks, in order.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "ffn/ffn.h"

namespace flashclient {

// Where the down column's kernels have group sums (kernels.h) they are used, so the bits may differ from those of
// Ffn::add_rows(). They depend neither on the chunks nor on the other tokens or the number of threads.
//
// A group whose neurons have not all come waits for the rest: their down columns are copied. Not for several threads at
// once, and y is undefined until finish().
class FfnSum {
  public:
    // y [tokens, hidden] += the sum, after finish(). All must outlive this.
    FfnSum(const Ffn& ffn, const float* x, size_t tokens, float* y);
    ~FfnSum();

    // The next neurons, without masks. Throws what Ffn::add_rows() throws.
    void add(const Neurons& list);
    void finish();  // there are no more

  private:
    void add_block(const Neurons& list);
    void add_groups(const float* h, size_t count);
    void keep(const float* h, size_t first, size_t count);
    bool in_groups() const { return !ffn_.in_slabs() && ffn_.down_.kernels->groups != nullptr; }
    template <typename Copy>
    void for_strips(const Copy& copy);

    const Ffn& ffn_;
    std::unique_ptr<Ffn::Rows> x_;
    float* y_;
    float* sums_ = nullptr;          // y as GroupSums::add() takes it
    std::vector<char> sums_memory_;  // of sums_
    std::vector<const void*> rows_;  // down columns: of the neurons that wait, and of the next ones
    size_t waiting_ = 0;
    std::vector<char> columns_;  // of the neurons that wait
    std::vector<float> h_;       // theirs: [group of tokens][neuron, token]
    std::vector<char> packed_;   // what GroupSums::add() takes
};

}  // namespace flashclient
