#include "in_process_engine.h"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

namespace weightd {

// Writes down where cells are, which is what a client does with the answers of the ring.
class InProcessEngine::Tables final : public Session {
  public:
    Tables(InProcessEngine& owner, uint32_t cells, uint32_t share) : Session(0, cells, share, true), owner_(owner) {}
    void granted(uint32_t tag, uint32_t cell, Place place, const Pool& pool) override {  // the tag is the layer
        owner_.tables_[tag][cell] = reinterpret_cast<uint64_t>(pool.address(place));
        const std::span<const std::byte> segment = place.segment->memory.bytes();
        const auto same = [&](const auto& other) { return other.data() == segment.data(); };
        if (std::none_of(owner_.segments_.begin(), owner_.segments_.end(), same)) owner_.segments_.push_back(segment);
        owner_.unanswered_--;
        owner_.held_++;
    }
    void failed(uint32_t, uint32_t, ring::Status, uint32_t) override {
        owner_.unanswered_--;
        owner_.failed_ = true;
    }
    void flush() override {}

  private:
    InProcessEngine& owner_;
};

InProcessEngine::InProcessEngine(uint64_t dram_bytes, const ModelSpec& spec, const ReaderChoice& choice,
                                 uint32_t slots_wanted)
    : verifier_(1), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
    std::string note;
    reader_ = make_reader(choice.kind, choice.threads, choice.depth, note);
    engine_ = std::make_unique<Engine>(dram_bytes, *reader_, verifier_, false);
    for (const int fd : {reader_->event_fd(), verifier_.event_fd()}) {
        epoll_event event{EPOLLIN | EPOLLET, {}};
        if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) < 0)
            throw std::system_error(errno, std::generic_category(), "epoll_ctl");
    }
    for (const LayerSpec& layer : spec.layers) tables_.emplace_back(layer.cells);
    engine_->models().add(spec, choice.allow_buffered);
    while (!engine_->models().activate(0)) engine_->step();
    const uint32_t share = engine_->models().share_for(0, slots_wanted);
    session_ = &engine_->open(std::make_unique<Tables>(*this, spec.cell_count(), share));
}

InProcessEngine::~InProcessEngine() {
    engine_->models().end();
    engine_->close(session_->id);
    while (engine_->reading()) engine_->step();  // nothing may land in memory that is gone
}

void InProcessEngine::exchange(uint32_t layer, std::span<const uint32_t> acquire, std::span<const uint32_t> release) {
    for (const uint32_t cell : release) held_ -= std::exchange(tables_.at(layer).at(cell), 0) != 0;
    unanswered_ += static_cast<uint32_t>(acquire.size());
    if (!engine_->release(*session_, layer, release) || !engine_->acquire(*session_, layer, acquire, layer))
        throw std::invalid_argument("a cell is held already, or is not held");
    engine_->step();
}

uint32_t InProcessEngine::arrived() {
    const uint32_t before = unanswered_;
    while (unanswered_ > 0 && unanswered_ == before) {
        if (!engine_->step()) wait();
    }
    if (std::exchange(failed_, false)) throw std::runtime_error("a cell cannot be had");
    return unanswered_;
}

void InProcessEngine::release_all() {
    while (unanswered_ > 0) arrived();
    std::vector<uint32_t> held;
    for (uint32_t layer = 0; layer < tables_.size(); layer++) {
        held.clear();
        for (uint32_t cell = 0; cell < tables_[layer].size(); cell++) {
            if (tables_[layer][cell] != 0) held.push_back(cell);
        }
        exchange(layer, {}, held);
    }
}

void InProcessEngine::wait() const {
    epoll_event event;
    if (::epoll_wait(epoll_.get(), &event, 1, -1) < 0 && errno != EINTR)
        throw std::system_error(errno, std::generic_category(), "epoll_wait");
}

}  // namespace weightd
