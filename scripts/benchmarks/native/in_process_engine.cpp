#include "in_process_engine.h"

#include <sys/epoll.h>

#include <cerrno>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "device/system_error.h"

namespace weightd {

using flashclient::Arrival;

// Notes the engine's answers. The tag is the layer.
class InProcessEngine::Answers final : public Session {
  public:
    Answers(InProcessEngine& owner, uint32_t cells, uint32_t share) : Session(0, cells, share, true), owner_(owner) {}
    void granted(uint32_t, uint32_t cell, Place place, const Pool& pool) override {
        if (owner_.lent_.insert(place.segment->number).second) owner_.lend_(place.segment->memory.bytes());
        owner_.arrived_.emplace_back(cell, reinterpret_cast<uint64_t>(pool.address(place)));
    }
    void failed(uint32_t, uint32_t cell, ring::Status status, uint32_t) override {
        if (status == ring::REFUSED) {
            owner_.arrived_.emplace_back(cell, 0);
        } else {
            owner_.failed_ = true;
        }
    }
    void flush() override {}

  private:
    InProcessEngine& owner_;
};

InProcessEngine::InProcessEngine(uint64_t dram_bytes, const ModelSpec& spec, const ReaderChoice& choice,
                                 uint32_t slots_wanted, Lend lend)
    : verifier_(1), lend_(std::move(lend)), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
    std::string note;
    reader_ = make_reader(choice.kind, choice.threads, choice.depth, note);
    engine_ = std::make_unique<Engine>(dram_bytes, *reader_, verifier_, false);
    for (const int fd : {reader_->event_fd(), verifier_.event_fd()}) {
        epoll_event event{EPOLLIN | EPOLLET, {}};
        if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) < 0) fail("epoll_ctl");
    }
    engine_->models().add(spec, choice.allow_buffered);
    while (!engine_->models().activate(0)) engine_->step();
    const uint32_t share = engine_->models().share_for(0, slots_wanted);
    session_ = &engine_->open(std::make_unique<Answers>(*this, spec.cell_count(), share));
}

InProcessEngine::~InProcessEngine() {
    engine_->models().end();
    engine_->close(session_->id);
    while (engine_->reading()) engine_->step();  // nothing may land in memory that is gone
}

void InProcessEngine::exchange(uint32_t layer, const std::vector<uint32_t>& acquire,
                               const std::vector<uint32_t>& release) {
    cancel();
    layer_ = layer;
    extend(acquire, release);
}

void InProcessEngine::extend(const std::vector<uint32_t>& acquire, const std::vector<uint32_t>& release) {
    if (!engine_->release(*session_, layer_, release) || !engine_->acquire(*session_, layer_, acquire, layer_)) {
        throw std::invalid_argument("a cell is not held, or does not exist");
    }
    engine_->step();
}

std::vector<Arrival> InProcessEngine::arrived() {
    while (arrived_.empty() && session_->unanswered > 0) take();
    if (std::exchange(failed_, false)) throw std::runtime_error("a cell cannot be read");
    return std::exchange(arrived_, {});
}

// Waits for cells that are on their way, because only granted cells may be given back.
void InProcessEngine::cancel() {
    while (session_->unanswered > 0) take();
    std::vector<uint32_t> granted;
    for (const auto& [cell, address] : std::exchange(arrived_, {})) {
        if (address != 0) granted.push_back(cell);
    }
    if (!granted.empty()) engine_->release(*session_, layer_, granted);
    failed_ = false;
}

std::vector<uint64_t> InProcessEngine::lease_range(uint32_t layer, uint32_t first, uint32_t count) {
    std::vector<uint32_t> cells(count);
    std::iota(cells.begin(), cells.end(), first);
    exchange(layer, cells, {});
    while (session_->unanswered > 0) take();
    std::vector<uint64_t> addresses(count);
    bool all = !failed_ && arrived_.size() == count;
    for (const auto& [cell, address] : arrived_) {
        addresses[cell - first] = address;
        all = all && address != 0;
    }
    if (!all) {
        cancel();
        throw std::runtime_error("a cell cannot be read, or the range exceeds the share");
    }
    arrived_.clear();
    return addresses;
}

void InProcessEngine::release_range(uint32_t layer, uint32_t first, uint32_t count) {
    std::vector<uint32_t> cells(count);
    std::iota(cells.begin(), cells.end(), first);
    exchange(layer, {}, cells);
}

void InProcessEngine::take() {
    if (!engine_->step()) wait();
}

void InProcessEngine::wait() const {
    epoll_event event;
    if (::epoll_wait(epoll_.get(), &event, 1, -1) < 0 && errno != EINTR) fail("epoll_wait");
}

}  // namespace weightd
