// An engine on a thread of its own, with its reader, its pool and the data socket.
//
// The thread is an event loop: doorbells in, batches of reads out, completions back. It alone touches the engine. The
// public methods may be called from any thread: each runs as a command on the loop (commands.h), and what blocks
// (reading resident weights, waiting for fetched cells) happens in the caller's thread.
#pragma once

#include <memory>
#include <string>
#include <thread>

#include "engine/engine.h"
#include "service/commands.h"
#include "service/connections.h"
#include "service/fetches.h"
#include "service/openings.h"
#include "service/pressure_signals.h"
#include "service/report.h"
#include "session/epoll.h"
#include "session/ring_sessions.h"

namespace weightd {

struct EngineOptions {
    uint64_t dram_bytes = 0;
    ReaderChoice reader{};
    std::string data_socket;  // a path
    bool warms = true;        // of Engine
    PressureChoice pressure{};
};

class EngineThread {
  public:
    // Listens on the data socket. Bundles are read by `reader`, if there is one, else by the one that the options name.
    // Throws std::system_error.
    explicit EngineThread(EngineOptions options, std::unique_ptr<Reader> reader = nullptr);
    ~EngineThread();

    std::string io_level();  // of the reader, and whether some file is read through the page cache
    const std::string& io_note() const { return io_note_; }

    uint32_t add_model(ModelSpec spec) { return openings_.add_model(std::move(spec)); }
    // False: somebody uses the model. Its index is not used again.
    bool remove_model(uint32_t model) {
        return commands_.on_loop([&] { return engine_.models().remove(model); });
    }
    // --dram and its floor from now on, unless --dram is more already.
    void raise_dram(uint64_t dram_bytes, uint64_t floor_bytes) {
        commands_.on_loop([&] { engine_.models().raise_dram(dram_bytes, floor_bytes); });
    }
    // What sessions get from now on; those that are open keep theirs.
    void set_predictors(uint32_t model, const PredictorsFile& file) {
        commands_.on_loop([&] { engine_.model(model).predictors_file = file; });
    }
    void seed(uint32_t model, std::span<const Hotness> hotness) {
        commands_.on_loop([&] { engine_.models().seed(model, hotness); });
    }
    std::vector<Hotness> hotness(uint32_t model) {
        return commands_.on_loop([&] { return engine_.models().hotness(model); });
    }
    // Only a process of `user` can attach to the session; of any user, if there is none.
    Opened open_session(uint32_t model, uint32_t slots_wanted, const User& user = std::nullopt, bool predicts = true) {
        return openings_.open_session(model, slots_wanted, user, predicts);
    }
    // Whole cells of `layer`, back to back in the order asked.
    void fetch(uint32_t model, uint32_t layer, std::span<const uint32_t> cells, std::span<std::byte> out) {
        fetches_.cells(model, layer, cells, out);
    }
    void fetch_resident(uint32_t model, uint64_t offset_bytes, std::span<std::byte> out) {
        fetches_.resident(model, offset_bytes, out);
    }
    Report report();
    // Readable once the loop has ended by a fault; then failure() says which, and every call throws Stopping.
    int failed_fd() const { return failed_event_.get(); }
    std::string failure() const { return commands_.failure(); }
    void stop();  // closes every session, wakes its client, joins the loop; can be called twice

  private:
    void run();
    void loop();
    void sleep_until_event();
    int sleep_limit_ms(bool asked) const;
    void handle(const Epoll::Event& event);
    void check_periodically();

    const ReaderChoice choice_;
    std::string io_note_;
    const Clock::time_point started_ = Clock::now();
    std::unique_ptr<Reader> reader_;
    Verifier verifier_;
    Engine engine_;
    Epoll epoll_;
    Commands commands_;
    Descriptor failed_event_;
    PressureSignals pressure_;
    RingSessions sessions_;
    Connections connections_;
    Openings openings_;
    Fetches fetches_;
    Clock::time_point next_check_;
    std::thread thread_;
};

}  // namespace weightd
