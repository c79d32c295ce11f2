#include "service.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace weightd {
namespace {

constexpr uint32_t CONNECTIONS_MAX = 64;  // that have not said Hello; more are closed at once
constexpr std::chrono::seconds HELLO_WITHIN{10};
constexpr std::chrono::seconds ROOM_WITHIN{10};    // how long an opener waits for segments to drain
constexpr std::chrono::seconds RELIEVE_AFTER{10};  // without a signal, of which the kernel sends one in two seconds
constexpr int CHECK_MS = 1000;                     // for sessions that were not attached in time, or that block others

enum Kind : uint64_t { WAKE_ONLY = 0, COMMAND, LISTENER, CONNECTION, SESSION, PRESSURE };

uint64_t event_data(Kind kind, uint32_t id) { return static_cast<uint64_t>(kind) << 32 | id; }

[[noreturn]] void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

Descriptor listen_at(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        fail(path);
    }
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    Descriptor listener(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    ::unlink(path.c_str());
    if (listener.get() < 0 || ::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) < 0 ||
        ::listen(listener.get(), CONNECTIONS_MAX) < 0) {
        fail(path);
    }
    return listener;
}

bool out_of_descriptors(int error) { return error == EMFILE || error == ENFILE; }

std::optional<PredictorsFile> missing_predictors(const ModelState& state) {
    const auto& newest = state.predictors_file;
    const bool there = newest && state.predictors != nullptr && state.predictors->version == newest->version;
    return there ? std::nullopt : newest;
}

uint32_t verify_threads() { return std::max(1U, std::thread::hardware_concurrency() / 2); }

}  // namespace

Service::Service(uint64_t dram_bytes, ReaderChoice choice, const std::string& data_socket, bool warms,
                 PressureChoice pressure)
    : choice_(std::move(choice)), data_socket_path_(data_socket), pressure_(std::move(pressure)) {
    reader_ = make_reader(choice_.kind, choice_.threads, choice_.depth, io_note_);
    verifier_ = std::make_unique<Verifier>(verify_threads());
    engine_ = std::make_unique<Engine>(dram_bytes, *reader_, *verifier_, choice_.unbundled, warms);
    epoll_ = Descriptor(::epoll_create1(EPOLL_CLOEXEC));
    command_event_ = Descriptor(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    failed_event_ = Descriptor(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (epoll_.get() < 0 || command_event_.get() < 0 || failed_event_.get() < 0) fail("epoll");
    listener_ = listen_at(data_socket);
    watch(command_event_.get(), event_data(COMMAND, 0), EPOLLIN);
    watch(reader_->event_fd(), event_data(WAKE_ONLY, 0), EPOLLIN | EPOLLET);
    watch(verifier_->event_fd(), event_data(WAKE_ONLY, 0), EPOLLIN);
    watch(listener_.get(), event_data(LISTENER, 0), EPOLLIN);
    watch_pressure();
    thread_ = std::thread([this] { run(); });
}

Service::~Service() { stop(); }

void Service::stop() {
    {
        const std::lock_guard guard(command_lock_);
        stopping_ = true;
    }
    const uint64_t one = 1;
    if (::write(command_event_.get(), &one, sizeof one) < 0) return;
    if (thread_.joinable()) thread_.join();
    ::unlink(data_socket_path_.c_str());
}

void Service::watch(int fd, uint64_t data, uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = data;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) < 0) fail("epoll_ctl");
}

void Service::unwatch(int fd) {
    if (fd >= 0) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
}

// ---- the loop ----

void Service::run() {
    ::pthread_setname_np(::pthread_self(), "weightd-engine");
    try {
        loop();
    } catch (const std::exception& error) {  // nothing that a client does leads here; the process must not go on
        fail_with(error.what());
    }
    engine_->end();
    while (!rings_.empty()) close_session(rings_.begin()->first, ring::CLOSED_BY_DAEMON);
    remains_.clear();
    connections_.clear();
    while (engine_->reading()) {  // nothing may land in memory that is gone
        if (!engine_->step()) ::usleep(200);
    }
    run_all_commands();  // whoever posted one while we stopped is answered, told of it by the event or not yet
}

void Service::fail_with(const std::string& what) {
    {
        const std::lock_guard guard(command_lock_);
        stopping_ = true;
        failure_ = what;
    }
    ::eventfd_write(failed_event_.get(), 1);
}

std::string Service::failure() {
    const std::lock_guard guard(command_lock_);
    return failure_;
}

void Service::loop() {
    while (true) {
        run_commands();
        if (stopping()) return;
        bool any = serve_rings();
        now_and_then();
        any = engine_->step() || any;  // last: it answers whom the others made way for
        if (!any) sleep_until_event();
    }
}

bool Service::serve_rings() {
    bool any = false;
    for (auto next = rings_.begin(); next != rings_.end();) {
        const auto [id, ring] = *next++;
        if (!ring->attached()) continue;
        any = serve_ring(*ring) || any;
        if (ring->broken()) close_session(id, ring::CLOSED_FOR_A_BROKEN_RULE);
    }
    return any;
}

bool Service::serve_ring(RingSession& session) {
    bool any = false;
    for (uint32_t i = 0; i < ring::REQUESTS; i++) {  // then the others have their turn
        const auto taken = session.take();
        if (!taken) break;
        any = true;
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
        if (session.broken()) break;
    }
    return any;
}

void Service::sleep_until_event() {
    bool waiting = false;
    bool unattached = !connections_.empty();
    for (const auto& [id, ring] : rings_) {
        ring->announce_sleep(true);
        waiting = waiting || (ring->attached() && (ring->has_requests() || ring->broken()));
        unattached = unattached || !ring->attached();
    }
    std::array<epoll_event, 64> events;
    const bool ticks = unattached || !accepts_ || engine_->waiting() || engine_->pressed();
    const int timeout_ms = waiting ? 0 : ticks ? CHECK_MS : -1;
    const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout_ms);
    if (count < 0 && errno != EINTR) fail("epoll_wait");
    for (const auto& [id, ring] : rings_) ring->announce_sleep(false);
    for (int i = 0; i < count; i++) {
        const auto kind = static_cast<Kind>(events[i].data.u64 >> 32);
        const auto id = static_cast<uint32_t>(events[i].data.u64);
        if (kind == LISTENER) accept_connections();
        if (kind == CONNECTION) greet(static_cast<int>(id));
        if (kind == SESSION) close_session(id, ring::CLOSED_BY_DAEMON);  // hung up, spoke, or its process ended
        if (kind == PRESSURE) hear_pressure(static_cast<int>(id), events[i].events);
    }
    if (unattached) close_expired();
}

// ---- memory pressure ----

void Service::watch_pressure() {
    engine_->set_floor(pressure_.floor_bytes);
    for (const int fd : {pressure_.machine.get(), pressure_.cgroup.get()}) {
        if (fd >= 0) watch(fd, event_data(PRESSURE, static_cast<uint32_t>(fd)), EPOLLPRI);
    }
}

void Service::hear_pressure(int fd, uint32_t events) {
    if ((events & EPOLLERR) != 0) {  // its cgroup has gone: it would be ready for ever
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
        return;
    }
    if (fd == pressure_.machine.get() && !machine_is_short()) return;
    pressure_signals_++;
    relieve_at_ = Clock::now() + RELIEVE_AFTER;
    engine_->press();
}

// ---- commands ----

void Service::post(std::function<void()> command) {
    {
        const std::lock_guard guard(command_lock_);
        if (stopping_) throw Stopping();
        commands_.push_back(std::move(command));
    }
    const uint64_t one = 1;
    if (::write(command_event_.get(), &one, sizeof one) < 0) fail("eventfd");
}

bool Service::stopping() {
    const std::lock_guard guard(command_lock_);
    return stopping_;
}

void Service::run_commands() {
    uint64_t ignored = 0;
    if (::read(command_event_.get(), &ignored, sizeof ignored) == sizeof ignored) run_all_commands();
}

void Service::run_all_commands() {
    std::vector<std::function<void()>> commands;
    {
        const std::lock_guard guard(command_lock_);
        commands.swap(commands_);
    }
    for (const auto& command : commands) command();
}

uint32_t Service::add_model(ModelSpec spec) {
    return on_loop([&] { return engine_->add_model(std::move(spec), choice_.allow_buffered); });
}

std::string Service::io_level() {
    const bool buffered = on_loop([&] {
        return std::any_of(engine_->models().begin(), engine_->models().end(),
                           [](const auto& model) { return model->file->buffered(); });
    });
    return reader_->level() + (buffered ? ", through the page cache" : "");
}

std::mutex& Service::opening_of(uint32_t model) {
    const std::lock_guard guard(opening_lock_);
    return opening_[model];
}

// Off the loop: the engine's list of models grows there. What openers use of a model never changes or is theirs.
ModelState& Service::model(uint32_t index) {
    return on_loop([&]() -> ModelState& { return engine_->model(index); });
}

void Service::ensure_active(uint32_t model, Use use) {
    const std::lock_guard guard(opening_of(model));
    wait_for_room(model, [&] { return engine_->activate(model, use); });
    ModelState& state = this->model(model);  // its spec never changes, and only openers write `resident`
    if (state.resident_ready) return;
    try {
        SharedMemory resident = load_resident(state.spec, choice_);
        on_loop([&] {
            state.resident = std::move(resident);
            state.resident_ready = true;
        });
    } catch (...) {
        on_loop([&] { engine_->leave(model); });
        throw;
    }
}

// Until `reserve`, on the loop, has found memory.
void Service::wait_for_room(uint32_t model, const std::function<bool()>& reserve) {
    const auto give_up = Clock::now() + ROOM_WITHIN;
    while (!on_loop(reserve)) {
        if (Clock::now() > give_up) {
            on_loop([&] { engine_->stop_waiting(model); });
            throw NoRoom("the pool is leased: no segment became free; end a session");
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
}

void Service::set_predictors(uint32_t model, const PredictorsFile& file) {
    on_loop([&] { engine_->model(model).predictors_file = file; });
}

void Service::ensure_predictors(uint32_t model) {
    const std::lock_guard guard(opening_of(model));
    ModelState& state = this->model(model);
    while (const auto wanted = on_loop([&] { return missing_predictors(state); })) {
        std::shared_ptr<Predictors> fresh;
        wait_for_room(model, [&] { return (fresh = engine_->reserve_predictors(model, *wanted)) != nullptr; });
        try {
            fresh->memory = load_predictors(state.spec.name, *wanted, choice_);
            on_loop([&] { state.predictors = std::move(fresh); });
        } catch (...) {
            const bool newest = on_loop([&] {
                fresh.reset();
                return state.predictors_file->version == wanted->version;
            });
            if (newest) throw;  // else its file has gone, because a newer one came
        }
    }
}

Opened Service::open_session(uint32_t model, uint32_t slots_wanted, std::optional<uid_t> user) {
    on_loop([&] { count_opening(); });
    try {
        ensure_active(model, Use::session);
        try {
            ensure_predictors(model);
        } catch (...) {
            on_loop([&] { engine_->leave(model); });
            throw;
        }
        return on_loop([&] { return open_active(model, slots_wanted, user); });
    } catch (...) {
        on_loop([&] { opening_sessions_--; });
        throw;
    }
}

void Service::count_opening() {
    const size_t there = rings_.size() + remains_.size() + opening_sessions_;
    if (there >= SESSIONS_MAX) {
        throw NoRoom("no session is left: " + std::to_string(there) + " are open or being opened, at most " +
                     std::to_string(SESSIONS_MAX) + " can be: end a session");
    }
    opening_sessions_++;
}

Opened Service::open_active(uint32_t model, uint32_t slots_wanted, std::optional<uid_t> user) {
    try {
        Token token;
        if (::getrandom(token.data(), token.size(), 0) != static_cast<ssize_t>(token.size())) fail("getrandom");
        const uint32_t share = engine_->share_for(model, slots_wanted);
        ModelState& state = engine_->model(model);
        auto ring = std::make_unique<RingSession>(model, state.spec.cell_count(), share, token, user, state.predictors);
        RingSession* opened = ring.get();
        engine_->open(std::move(ring));
        rings_[opened->id] = opened;
        state.sessions++;
        opening_sessions_--;
        return {token, share};
    } catch (const std::system_error& error) {
        engine_->leave(model);
        if (!out_of_descriptors(error.code().value())) throw;
        throw NoRoom("no file descriptor is left for a session: raise LimitNOFILE or ulimit -n, or end a session");
    } catch (...) {
        engine_->leave(model);
        throw;
    }
}

// ---- the data socket ----

void Service::accept_connections() {
    while (true) {
        Descriptor socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (socket.get() < 0 && out_of_descriptors(errno)) listen(false);  // else it would be ready for ever
        if (socket.get() < 0) return;
        if (connections_.size() < CONNECTIONS_MAX) add_connection(std::move(socket));
    }
}

void Service::add_connection(Descriptor socket) {
    const int fd = socket.get();
    try {
        watch(fd, event_data(CONNECTION, static_cast<uint32_t>(fd)), EPOLLIN | EPOLLRDHUP);
    } catch (const std::system_error&) {
        return;  // the system's limit of watches: this client sees that it is hung up on
    }
    connections_[fd] = {std::move(socket), Clock::now() + HELLO_WITHIN};
}

void Service::listen(bool accepts) {
    if (accepts == accepts_) return;
    accepts_ = accepts;
    epoll_event event{};
    event.events = accepts ? uint32_t{EPOLLIN} : 0;
    event.data.u64 = event_data(LISTENER, 0);
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, listener_.get(), &event) < 0) fail("epoll_ctl");
}

void Service::greet(int fd) {
    const auto found = connections_.find(fd);
    if (found == connections_.end()) return;
    ring::Hello hello{};
    const ssize_t got = ::recv(fd, &hello, sizeof hello, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    Descriptor socket = std::move(found->second.socket);
    connections_.erase(found);
    unwatch(fd);
    if (got != sizeof hello || hello.magic != ring::MAGIC) return;
    if (hello.version != ring::VERSION) return refuse(fd, EPROTO);
    const auto same = [&](const auto& entry) {
        return !entry.second->attached() &&
               std::equal(hello.token, hello.token + sizeof hello.token, entry.second->token().begin());
    };
    const auto ring = std::find_if(rings_.begin(), rings_.end(), same);
    if (ring == rings_.end()) return refuse(fd, ENOENT);
    attach(std::move(socket), *ring->second);
}

void Service::attach(Descriptor socket, RingSession& session) {
    const int fd = socket.get();
    ucred peer{};
    socklen_t peer_bytes = sizeof peer;
    if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &peer_bytes) < 0) return refuse(fd, EPERM);
    if (!session.is_for(peer.uid)) return refuse(fd, EPERM);
    Descriptor process = process_of(fd, peer);
    if (process.get() < 0 && out_of_descriptors(errno)) return refuse(fd, errno);
    try {
        // Nothing is to come after Hello. A message that lay there unread could hold this very connection open, as one
        // of the descriptors that came with it.
        watch(fd, event_data(SESSION, session.id), EPOLLIN | EPOLLRDHUP | EPOLLHUP);
        // A forked child of the client keeps the socket open, so its end alone would not tell that the client is gone.
        if (process.get() >= 0) watch(process.get(), event_data(SESSION, session.id), EPOLLIN);
        // Edge-triggered and never read: a client that fills it or clears O_NONBLOCK hurts only itself.
        watch(session.doorbell_fd(), event_data(WAKE_ONLY, 0), EPOLLIN | EPOLLET);
    } catch (const std::system_error& error) {
        return refuse(fd, error.code().value());
    }
    const ModelState& state = engine_->model(session.model);
    if (!session.attach(std::move(socket), std::move(process), peer, state.spec.resident_bytes,
                        state.resident.shared_fd())) {
        close_session(session.id, ring::CLOSED_BY_DAEMON);
    }
}

void Service::refuse(int fd, int error) {
    const ring::Welcome welcome{ring::MAGIC, ring::VERSION, 0, 0, 0, static_cast<uint32_t>(error)};
    send_with_descriptors(fd, &welcome, sizeof welcome, {});
}

void Service::now_and_then() {
    const auto now = Clock::now();
    if (now < next_look_) return;
    next_look_ = now + std::chrono::milliseconds(CHECK_MS);
    listen(true);
    close_blocking();
    if (engine_->pressed() && now > relieve_at_) engine_->relieve();
    engine_->look();
}

}  // namespace weightd
