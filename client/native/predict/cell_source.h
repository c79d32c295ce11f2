// Where the cells of a model are leased one by one, by predict mode and for experts: from the daemon's pool over a ring
// (ring/leases.h), or from a pool that Python fills over gRPC.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace flashclient {

using CellRange = std::pair<uint32_t, uint32_t>;
using Arrival = std::pair<uint32_t, uint64_t>;  // a cell and its address; address 0: the lease was refused

// The caller, a Window (window.h) or a CellWalk (experts/cell_walk.h), keeps the account of what is leased; a source
// does not. After an exchange() or extend() that threw, the caller counts the cells of `release` as given back, and
// those of `acquire` as not leased. The next cancel() makes that true, unless everything was lost: then the caller
// forgets all.
class CellSource {
  public:
    virtual ~CellSource() = default;
    // Cells that may always be leased at once; at least 1.
    virtual uint32_t share_slots() = 0;
    // Cells that may be leased at once now: the share, and what may be borrowed above it.
    virtual uint32_t lease_limit() = 0;
    // Gives back cells of `layer` that have arrived, then asks for others. Does not wait.
    virtual void exchange(uint32_t layer, const std::vector<uint32_t>& acquire,
                          const std::vector<uint32_t>& release) = 0;
    // The same for the layer of the last exchange(), while cells that it asked for may be on their way.
    virtual void extend(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) = 0;
    // Cells [begin, end) of `layer` that its next step may want. A hint: nothing is leased, and there is no answer.
    virtual void prefetch(uint32_t /*layer*/, const std::vector<CellRange>& /*ranges*/) {}
    // Waits until more of the cells asked for have arrived, and returns them; none where none is on its way. Refusals
    // mean that the limit has fallen. Throws where a cell cannot be read.
    virtual std::vector<Arrival> arrived() = 0;
    // Gives back what was asked for and was not returned by arrived(), and what could not be given back before.
    virtual void cancel() = 0;
};

}  // namespace flashclient
