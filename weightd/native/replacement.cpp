#include "replacement.h"

#include <algorithm>
#include <cassert>
#include <vector>

namespace weightd {
namespace {

struct Link {
    uint32_t previous = NO_CELL;
    uint32_t next = NO_CELL;
};

// A doubly linked list over cell numbers, in arrays that exist from the start.
class CellList {
  public:
    explicit CellList(uint32_t cells) : links_(cells) {}
    uint32_t first() const { return first_; }
    uint32_t next(uint32_t cell) const { return links_[cell].next; }
    uint32_t size() const { return size_; }

    void push_back(uint32_t cell) {
        links_[cell] = {last_, NO_CELL};
        (last_ == NO_CELL ? first_ : links_[last_].next) = cell;
        last_ = cell;
        size_++;
    }

    void remove(uint32_t cell) {
        const Link link = links_[cell];
        (link.previous == NO_CELL ? first_ : links_[link.previous].next) = link.next;
        (link.next == NO_CELL ? last_ : links_[link.next].previous) = link.previous;
        size_--;
    }

  private:
    std::vector<Link> links_;
    uint32_t first_ = NO_CELL;
    uint32_t last_ = NO_CELL;
    uint32_t size_ = 0;
};

struct Flags {
    uint8_t lir : 1;
    uint8_t present : 1;
    uint8_t pinned : 1;
    uint8_t in_stack : 1;
    uint8_t in_queue : 1;
};

class Lirs final : public Replacement {
  public:
    explicit Lirs(uint32_t cells) : flags_(cells), stack_(cells), queue_(cells) {}

    void resize(uint32_t slots) override {
        slots_ = slots;
        lir_max_ = slots - std::min(slots, hir_least());
        victims_until_review_ = slots;
        queue_least_ = UINT32_MAX;
        while (lirs_ > lir_max_) demote_oldest();
    }

    void touched(uint32_t cell) override {
        Flags& flags = flags_[cell];
        assert(flags.present);
        if (flags.lir) {
            to_top(cell);
            prune();
        } else if (flags.in_stack) {  // used again before the oldest LIR cell was
            promote(cell);
        } else {
            to_top(cell);
            if (flags.in_queue) {
                queue_.remove(cell);
                queue_.push_back(cell);
            }
        }
    }

    void inserted(uint32_t cell) override {
        Flags& flags = flags_[cell];
        assert(!flags.present);
        flags.present = true;
        flags.pinned = true;
        if (flags.in_stack || lirs_ < lir_max_) {
            promote(cell);
        } else {
            to_top(cell);
        }
    }

    void pinned(uint32_t cell) override {
        flags_[cell].pinned = true;
        leave_queue(cell);
    }

    void unpinned(uint32_t cell) override {
        flags_[cell].pinned = false;
        if (!flags_[cell].lir) join_queue(cell);
    }

    void removed(uint32_t cell) override {
        leave_queue(cell);
        leave_stack(cell);
        if (flags_[cell].lir) lirs_--;
        flags_[cell] = {};
        prune();
    }

    uint32_t victim() override {
        review_shares();
        const uint32_t cell = queue_.first();
        if (cell == NO_CELL) return victim_among_lirs();
        leave_queue(cell);
        flags_[cell].present = false;  // it stays in the stack, as a memory of its last use
        return cell;
    }

  private:
    // One in a hundred slots is enough for what passes through (the paper's figure); never fewer than one.
    uint32_t hir_least() const { return std::max(1U, slots_ / 100); }

    // The queue must also hold what is leased for a moment: victim_among_lirs() takes room from the LIR cells when it
    // runs empty, and this gives back what a whole turn of the pool did not use.
    void review_shares() {
        queue_least_ = std::min(queue_least_, queue_.size());
        if (victims_until_review_-- > 0) return;
        if (queue_least_ > hir_least()) lir_max_ += queue_least_ - hir_least();
        lir_max_ = std::min(lir_max_, slots_ - std::min(slots_, hir_least()));
        victims_until_review_ = slots_;
        queue_least_ = UINT32_MAX;
    }

    uint32_t victim_among_lirs() {
        uint32_t cell = stack_.first();
        while (cell != NO_CELL && (!flags_[cell].lir || flags_[cell].pinned)) cell = stack_.next(cell);
        if (cell == NO_CELL) return NO_CELL;
        lir_max_ = std::max(1U, lir_max_ - 1);
        removed(cell);
        return cell;
    }

    void promote(uint32_t cell) {
        flags_[cell].lir = true;
        lirs_++;
        leave_queue(cell);
        to_top(cell);
        while (lirs_ > std::max(1U, lir_max_)) demote_oldest();
        prune();
    }

    void demote_oldest() {
        prune();
        const uint32_t cell = stack_.first();
        flags_[cell].lir = false;
        lirs_--;
        leave_stack(cell);
        if (!flags_[cell].pinned) join_queue(cell);
        prune();
    }

    // The oldest cell of the stack is always a LIR cell: what lies below it can no longer become one.
    void prune() {
        while (stack_.first() != NO_CELL && !flags_[stack_.first()].lir) leave_stack(stack_.first());
    }

    void to_top(uint32_t cell) {
        leave_stack(cell);
        stack_.push_back(cell);
        flags_[cell].in_stack = true;
    }

    void leave_stack(uint32_t cell) {
        if (flags_[cell].in_stack) stack_.remove(cell);
        flags_[cell].in_stack = false;
    }

    void join_queue(uint32_t cell) {
        assert(!flags_[cell].in_queue);
        queue_.push_back(cell);
        flags_[cell].in_queue = true;
    }

    void leave_queue(uint32_t cell) {
        if (flags_[cell].in_queue) queue_.remove(cell);
        flags_[cell].in_queue = false;
    }

    std::vector<Flags> flags_;
    CellList stack_;  // by last use, oldest first: LIR cells, and HIR cells used since the oldest of those
    CellList queue_;  // HIR cells that may go, in order
    uint32_t slots_ = 0;
    uint32_t lirs_ = 0;
    uint32_t lir_max_ = 0;
    uint32_t victims_until_review_ = 0;
    uint32_t queue_least_ = UINT32_MAX;
};

}  // namespace

uint64_t Replacement::table_bytes(uint32_t cells) { return uint64_t{cells} * (sizeof(Flags) + 2 * sizeof(Link)); }

std::unique_ptr<Replacement> make_lirs(uint32_t cells) { return std::make_unique<Lirs>(cells); }

}  // namespace weightd
