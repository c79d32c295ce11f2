#include "service/engine_thread.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

namespace weightd {
namespace {

constexpr std::chrono::seconds RELIEVE_AFTER{10};  // without a signal, of which the kernel sends one in two seconds
constexpr int CHECK_MS = 1000;                     // for sessions that were not attached in time, or that block others
constexpr int DEFERRED_CHECK_MS = 20;              // for reads that wait for nothing but time

constexpr uint32_t UNATTACHED_MAX = 64;  // sessions
constexpr std::chrono::seconds ATTACH_WITHIN{10};
constexpr uint32_t SILENT_MAX = 64;  // connections
constexpr std::chrono::seconds HELLO_WITHIN{10};

constexpr uint32_t SESSION_WORK = 1024;  // in a turn: as many cells as a request names; a run of more comes in parts
constexpr uint32_t REQUEST_WORK = 16;    // to take a request costs as much as so many cells

uint32_t verify_threads() { return std::max(1U, std::thread::hardware_concurrency() / 2); }

}  // namespace

void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

bool out_of_descriptors(int error) { return error == EMFILE || error == ENFILE; }

EngineThread::EngineThread(EngineOptions options, std::unique_ptr<Reader> reader)
    : choice_(std::move(options.reader)),
      data_socket_path_(options.data_socket),
      pressure_(std::move(options.pressure)),
      reader_(std::move(reader)),
      unattached_(UNATTACHED_MAX, ATTACH_WITHIN),
      silent_(SILENT_MAX, HELLO_WITHIN) {
    if (reader_ == nullptr) reader_ = make_reader(choice_.kind, choice_.threads, choice_.depth, io_note_);
    verifier_ = std::make_unique<Verifier>(verify_threads());
    engine_ = std::make_unique<Engine>(options.dram_bytes, *reader_, *verifier_, options.warms);
    epoll_ = Descriptor(::epoll_create1(EPOLL_CLOEXEC));
    command_event_ = Descriptor(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    failed_event_ = Descriptor(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (epoll_.get() < 0 || command_event_.get() < 0 || failed_event_.get() < 0) fail("epoll");
    listener_ = listen_at(data_socket_path_);
    watch(command_event_.get(), event_data(COMMAND, 0), EPOLLIN);
    watch(reader_->event_fd(), event_data(WAKE_ONLY, 0), EPOLLIN | EPOLLET);
    watch(verifier_->event_fd(), event_data(WAKE_ONLY, 0), EPOLLIN);
    watch(listener_.get(), event_data(LISTENER, 0), EPOLLIN);
    watch_pressure();
    thread_ = std::thread([this] { run(); });
}

EngineThread::~EngineThread() { stop(); }

void EngineThread::stop() {
    {
        const std::lock_guard guard(command_lock_);
        stopping_ = true;
    }
    const uint64_t one = 1;
    if (::write(command_event_.get(), &one, sizeof one) < 0) return;
    if (thread_.joinable()) thread_.join();
    ::unlink(data_socket_path_.c_str());
}

void EngineThread::watch(int fd, uint64_t data, uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = data;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) < 0) fail("epoll_ctl");
}

void EngineThread::unwatch(int fd) {
    if (fd >= 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

// ---- the loop ----

void EngineThread::run() {
    ::pthread_setname_np(::pthread_self(), "weightd-engine");
    try {
        loop();
    } catch (const std::exception& error) {  // nothing that a client does leads here; the process must not go on
        fail_with(error.what());
    }
    engine_->models().end();
    while (!rings_.empty()) close_session(rings_.begin()->first, ring::CLOSED_BY_DAEMON);
    remains_.clear();
    connections_.clear();
    while (engine_->reading()) {  // nothing may land in memory that is gone
        if (!engine_->step()) ::usleep(200);
    }
    run_all_commands();  // whoever posted one while we stopped is answered, told of it by the event or not yet
}

void EngineThread::fail_with(const std::string& what) {
    {
        const std::lock_guard guard(command_lock_);
        stopping_ = true;
        failure_ = what;
    }
    ::eventfd_write(failed_event_.get(), 1);
}

std::string EngineThread::failure() {
    const std::lock_guard guard(command_lock_);
    return failure_;
}

void EngineThread::loop() {
    while (true) {
        run_commands();
        if (stopping()) return;
        engine_->tell_time(Clock::now());
        bool any = serve_rings();
        now_and_then();
        any = engine_->step() || any;  // last: it answers whom the others made way for
        if (!any) sleep_until_event();
    }
}

bool EngineThread::serve_rings() {
    std::vector<Turns::Waiting> waiting;
    for (const auto& [id, ring] : rings_) {
        if (ring->attached() && (ring->has_requests() || ring->broken())) waiting.push_back({ring->user(), id});
    }
    const bool any = !waiting.empty();
    turns_.round(std::move(waiting), [this](uint32_t id) {
        RingSession& ring = *rings_.at(id);
        const uint32_t work = serve_ring(ring);
        if (ring.broken()) close_session(id, ring::CLOSED_FOR_A_BROKEN_RULE);
        return work;
    });
    return any;
}

// A part of what the session asks for, and how much that was: it costs something to take a request, too.
uint32_t EngineThread::serve_ring(RingSession& session) {
    uint32_t work = 0;
    while (work < SESSION_WORK && !session.broken()) {
        const auto taken = session.take(SESSION_WORK);
        if (!taken) break;
        work += REQUEST_WORK + static_cast<uint32_t>(taken->cells.size() + taken->released.size());
        bool kept = false;
        switch (taken->op) {
            case ring::ACQUIRE:
                kept = engine_->release(session, taken->layer, taken->released) &&
                       engine_->acquire(session, taken->layer, taken->cells, taken->tag);
                break;
            case ring::RELEASE:
                kept = engine_->release(session, taken->layer, taken->cells);
                break;
            case ring::PREFETCH:
                kept = engine_->prefetch(session, taken->layer, taken->cells);
                break;
        }
        if (!kept) session.break_rule();
    }
    return work;
}

void EngineThread::sleep_until_event() {
    bool waiting = false;
    for (const auto& [id, ring] : rings_) {
        ring->announce_sleep(true);
        waiting = waiting || (ring->attached() && (ring->has_requests() || ring->broken()));
    }
    const bool half_open = !silent_.empty() || !unattached_.empty() || closed_rings_.size() > 0;
    std::array<epoll_event, 64> events;
    const bool ticks = half_open || !accepts_ || engine_->waiting() || engine_->models().pressure().pressed();
    const int timeout_ms = waiting ? 0 : engine_->defers_reads() ? DEFERRED_CHECK_MS : ticks ? CHECK_MS : -1;
    const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout_ms);
    if (count < 0 && errno != EINTR) fail("epoll_wait");
    for (const auto& [id, ring] : rings_) ring->announce_sleep(false);
    for (int i = 0; i < count; i++) {
        const auto kind = static_cast<Event>(events[i].data.u64 >> 32);
        const auto id = static_cast<uint32_t>(events[i].data.u64);
        if (kind == LISTENER) accept_connections();
        if (kind == CONNECTION) greet(static_cast<int>(id));
        if (kind == SESSION) close_session(id, ring::CLOSED_BY_DAEMON);  // hung up, spoke, or its process ended
        if (kind == PRESSURE) hear_pressure(static_cast<int>(id), events[i].events);
    }
}

// ---- memory pressure ----

void EngineThread::watch_pressure() {
    engine_->models().set_floor(pressure_.floor_bytes);
    for (const int fd : {pressure_.machine.get(), pressure_.cgroup.get()}) {
        if (fd >= 0) watch(fd, event_data(PRESSURE, static_cast<uint32_t>(fd)), EPOLLPRI);
    }
}

void EngineThread::hear_pressure(int fd, uint32_t events) {
    if ((events & EPOLLERR) != 0) {  // its cgroup has gone: it would be ready for ever
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
        return;
    }
    if (fd == pressure_.machine.get() && !machine_is_short()) return;
    pressure_signals_++;
    relieve_at_ = Clock::now() + RELIEVE_AFTER;
    engine_->models().press();
}

// ---- commands ----

void EngineThread::post(std::function<void()> command) {
    {
        const std::lock_guard guard(command_lock_);
        if (stopping_) throw Stopping();
        commands_.push_back(std::move(command));
    }
    const uint64_t one = 1;
    if (::write(command_event_.get(), &one, sizeof one) < 0) fail("eventfd");
}

bool EngineThread::stopping() {
    const std::lock_guard guard(command_lock_);
    return stopping_;
}

void EngineThread::run_commands() {
    uint64_t ignored = 0;
    if (::read(command_event_.get(), &ignored, sizeof ignored) == sizeof ignored) run_all_commands();
}

void EngineThread::run_all_commands() {
    std::vector<std::function<void()>> commands;
    {
        const std::lock_guard guard(command_lock_);
        commands.swap(commands_);
    }
    for (const auto& command : commands) command();
}

uint32_t EngineThread::add_model(ModelSpec spec) {
    auto opened = open_model(std::move(spec), choice_.allow_buffered);
    const Model& state = *opened;
    std::optional<uint32_t> index;
    wait_for_room(state, [&] {
        index = making_way(std::nullopt, [&] { return engine_->models().add(opened); });
        return index.has_value();
    });
    return *index;
}

std::string EngineThread::io_level() {
    const bool buffered = on_loop([&] {
        return std::any_of(engine_->models().all().begin(), engine_->models().all().end(),
                           [](const auto& model) { return model->file->buffered(); });
    });
    return reader_->level() + (buffered ? ", through the page cache" : "");
}

void EngineThread::now_and_then() {
    const auto now = Clock::now();
    if (now < next_check_) return;
    next_check_ = now + std::chrono::milliseconds(CHECK_MS);
    listen(true);
    close_blocking();
    close_expired();
    if (engine_->models().pressure().pressed() && now > relieve_at_) engine_->models().relieve();
    engine_->models().rebalance();
}

}  // namespace weightd
