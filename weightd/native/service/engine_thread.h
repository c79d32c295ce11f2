// The engine's thread: an event loop of doorbells in, batches of reads out, completions back.
//
// The public methods may be called from any thread. Each runs as a command on the loop, which alone touches the engine;
// what blocks (reading resident weights, waiting for fetched cells) happens in the caller's thread.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <thread>

#include "engine/engine.h"
#include "memory/resident.h"
#include "service/closed_rings.h"
#include "service/half_open.h"
#include "service/report.h"
#include "service/ring_session.h"
#include "service/turns.h"

namespace weightd {

struct CorruptBundle : std::runtime_error {  // a checksum differs, or flash cannot be read
    CorruptBundle(const std::string& model, uint32_t layer, uint32_t position, int error = 0);
    uint32_t layer;
    uint32_t position;  // of the first bundle of its cell, if that cannot be read
    int error;          // errno of the read, or 0
};

struct Stopping : std::runtime_error {
    Stopping() : std::runtime_error("weightd is stopping") {}
};

[[noreturn]] void fail(const std::string& what);  // std::system_error of errno
bool out_of_descriptors(int error);               // whether that errno says so

// Each takes three descriptors, four once it is attached, two more for each segment of the pool beside them.
inline constexpr uint32_t SESSIONS_MAX = 256;

struct PressureChoice {                 // what becomes of the pool when the system lacks memory
    uint64_t floor_bytes = UINT64_MAX;  // of --dram; as much as that is never taken from
    // Triggers of pressure stall information (PSI), set already: EPOLLPRI tells of pressure.
    Descriptor machine{};  // counts only while the machine is short of memory: it tells of any container at its limit
    Descriptor cgroup{};   // ours
};

struct EngineOptions {
    uint64_t dram_bytes;
    ReaderChoice reader;
    std::string data_socket;  // a path
    bool warms = true;        // of Engine
    PressureChoice pressure{};
};

struct Opened {
    Token token;
    uint32_t share_slots;
};

class EngineThread {
  public:
    // Listens on the data socket. Bundles are read by `reader`, if there is one, else by the one that the options name.
    // Throws std::system_error.
    explicit EngineThread(EngineOptions options, std::unique_ptr<Reader> reader = nullptr);
    ~EngineThread();

    std::string io_level();  // of the reader, and whether some file is read through the page cache
    const std::string& io_note() const { return io_note_; }

    uint32_t add_model(ModelSpec spec);
    // --dram and its floor from now on, unless --dram is more already.
    void raise_dram(uint64_t dram_bytes, uint64_t floor_bytes) {
        on_loop([&] { engine_->models().raise_dram(dram_bytes, floor_bytes); });
    }
    // What sessions get from now on; those that are open keep theirs.
    void set_predictors(uint32_t model, const PredictorsFile& file);
    void seed(uint32_t model, std::span<const Hotness> hotness) {
        on_loop([&] { engine_->models().seed(model, hotness); });
    }
    std::vector<Hotness> hotness(uint32_t model) {
        return on_loop([&] { return engine_->models().hotness(model); });
    }
    // Only a process of `user` can attach to it; of any user, if there is none.
    Opened open_session(uint32_t model, uint32_t slots_wanted, const User& user = std::nullopt);
    // Whole cells of `layer`, back to back in the order asked.
    void fetch(uint32_t model, uint32_t layer, std::span<const uint32_t> cells, std::span<std::byte> out);
    void fetch_resident(uint32_t model, uint64_t offset_bytes, std::span<std::byte> out);
    Report report();
    // Readable once the loop has ended by a fault; then failure() says which, and every call throws Stopping.
    int failed_fd() const { return failed_event_.get(); }
    std::string failure();
    void stop();  // closes every session, wakes its client, joins the loop; can be called twice

  private:
    enum Event : uint64_t { WAKE_ONLY = 0, COMMAND, LISTENER, CONNECTION, SESSION, PRESSURE };  // of epoll
    static uint64_t event_data(Event kind, uint32_t id) { return static_cast<uint64_t>(kind) << 32 | id; }

    void run();
    void loop();
    void fail_with(const std::string& what);
    void sleep_until_event();
    bool serve_rings();
    uint32_t serve_ring(RingSession& session);
    void run_commands();
    void run_all_commands();
    void now_and_then();
    static Descriptor listen_at(const std::string& path);
    void accept_connections();
    void add_connection(Descriptor socket);
    void listen(bool accepts);
    void greet(int fd);
    void attach(Descriptor socket, RingSession& session);
    void refuse(int fd, int error);
    void close_session(uint32_t id, ring::State state);
    void let_go(uint32_t id);
    void close_expired();
    void close_blocking();
    void watch(int fd, uint64_t data, uint32_t events);
    void unwatch(int fd);
    void watch_pressure();
    void hear_pressure(int fd, uint32_t events);
    Model& model(uint32_t index);
    // One opener's turn at a model, until it goes: its activation may take minutes, and is done once.
    class Turn {
      public:
        // Waits for the turns before, as long as the device answers them. Throws Unanswered, Stopping.
        Turn(EngineThread& service, uint32_t model);
        ~Turn();
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;
        void moved();  // the device has answered

      private:
        EngineThread& service_;
        const uint32_t model_;
    };
    friend class Turn;

    void count_opening(const User& user);
    void count_opened(const User& user);
    uint64_t sessions_of(const User& user) const;
    uint64_t bytes_of(const User& user) const;
    bool make_way(const User& user);
    // On the loop: what `reserve` gives, once enough has been taken from who keeps it and does not use it, or NoRoom.
    template <typename F>
    auto making_way(const User& user, F reserve) -> decltype(reserve()) {
        while (true) {
            try {
                return reserve();
            } catch (const NoRoom&) {
                if (!make_way(user)) throw;
            }
        }
    }
    Opened open_active(uint32_t model, uint32_t slots_wanted, const User& user);
    void ensure_active(uint32_t model, Use use, const User& user);
    void ensure_predictors(uint32_t model, const User& user);
    void wait_for_room(const Model& state, const std::function<bool()>& reserve);
    bool stopping();
    void post(std::function<void()> command);  // throws Stopping

    template <typename F>
    auto on_loop(F function) -> decltype(function()) {  // runs it there, waits, and passes on what it throws
        std::packaged_task<decltype(function())()> task(std::move(function));
        auto result = task.get_future();
        post([&task] { task(); });
        return result.get();
    }

    ReaderChoice choice_;
    std::string io_note_;
    std::string data_socket_path_;
    PressureChoice pressure_;
    uint64_t pressure_signals_ = 0;
    Clock::time_point relieve_at_;  // when there was no signal for a while
    Clock::time_point started_ = Clock::now();
    std::unique_ptr<Reader> reader_;
    std::unique_ptr<Verifier> verifier_;
    std::unique_ptr<Engine> engine_;
    Descriptor epoll_;
    Descriptor command_event_;
    Descriptor listener_;
    Descriptor failed_event_;
    std::mutex command_lock_;  // guards commands_, stopping_, failure_
    std::vector<std::function<void()>> commands_;
    bool stopping_ = false;
    std::string failure_;
    Clock::time_point next_check_;               // of now_and_then()
    bool accepts_ = true;                        // false while no descriptor is left for a connection
    std::map<User, uint32_t> opening_sessions_;  // not in rings_ yet
    std::mutex opening_lock_;                    // guards opening_
    std::condition_variable opened_;
    std::map<uint32_t, Clock::time_point> opening_;  // by model, while it is an opener's turn: when the device answered
    std::map<uint32_t, RingSession*> rings_;         // by session, attached or not
    std::map<uint32_t, Remains> remains_;            // by session
    Turns turns_;                                    // of rings_
    ClosedRings closed_rings_;
    HalfOpen unattached_;                    // of rings_
    HalfOpen silent_;                        // of connections_: all
    std::map<int, Descriptor> connections_;  // by descriptor, that have not said Hello yet
    std::thread thread_;
};

}  // namespace weightd
