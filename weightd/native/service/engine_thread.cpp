#include "service/engine_thread.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "device/system_error.h"

namespace weightd {
namespace {

constexpr int CHECK_MS = 1000;          // interval of checks for timeouts and blocking sessions
constexpr int DEFERRED_CHECK_MS = 20;   // interval of checks for deferred reads
constexpr uint32_t END_CHECK_US = 200;  // at the end: interval of checks for the last reads

uint32_t verify_threads() { return std::max(1U, std::thread::hardware_concurrency() / 2); }

std::unique_ptr<Reader> chosen(std::unique_ptr<Reader> given, const ReaderChoice& choice, std::string& note) {
    return given != nullptr ? std::move(given) : make_reader(choice.kind, choice.threads, choice.depth, note);
}

}  // namespace

EngineThread::EngineThread(EngineOptions options, std::unique_ptr<Reader> reader)
    : choice_(std::move(options.reader)),
      reader_(chosen(std::move(reader), choice_, io_note_)),
      verifier_(verify_threads()),
      engine_(options.dram_bytes, *reader_, verifier_, options.warms),
      failed_event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      pressure_(std::move(options.pressure), epoll_, engine_),
      sessions_(engine_, epoll_),
      connections_(options.data_socket, epoll_, sessions_),
      openings_(commands_, engine_, sessions_, choice_),
      fetches_(commands_, engine_, openings_, choice_.answer_within) {
    if (failed_event_.get() < 0) fail("eventfd");
    epoll_.watch(commands_.event_fd(), Watched::command, 0, EPOLLIN);
    epoll_.watch(reader_->event_fd(), Watched::wake_only, 0, EPOLLIN | EPOLLET);
    epoll_.watch(verifier_.event_fd(), Watched::wake_only, 0, EPOLLIN);
    thread_ = std::thread([this] { run(); });
}

EngineThread::~EngineThread() { stop(); }

void EngineThread::stop() {
    if (!commands_.stop()) return;
    if (thread_.joinable()) thread_.join();
    connections_.remove_socket();
}

void EngineThread::run() {
    ::pthread_setname_np(::pthread_self(), "weightd-engine");
    try {
        loop();
    } catch (const std::exception& error) {  // no client can cause this; the process must end
        commands_.fail(error.what());
        ::eventfd_write(failed_event_.get(), 1);
    }
    engine_.models().end();
    sessions_.close_all();
    connections_.close_all();
    while (engine_.reading()) {  // the memory that these reads write to is freed afterwards
        if (!engine_.step()) ::usleep(END_CHECK_US);
    }
    commands_.run_all();  // callers that posted while the loop ended are answered
}

void EngineThread::loop() {
    while (true) {
        commands_.run();
        if (commands_.stopping()) return;
        engine_.set_time(Clock::now());
        bool any = sessions_.serve();
        check_periodically();
        any = engine_.step() || any;  // last: grants slots that the steps above released
        if (!any) sleep_until_event();
    }
}

void EngineThread::sleep_until_event() {
    const bool asked = sessions_.announce_sleep();
    const auto events = epoll_.wait(sleep_limit_ms(asked));
    sessions_.announce_waking();
    for (const Epoll::Event& event : events) handle(event);
}

// 0 if a client has asked for something since it was last served; -1: without limit.
int EngineThread::sleep_limit_ms(bool asked) const {
    if (asked) return 0;
    if (engine_.defers_reads()) return DEFERRED_CHECK_MS;
    const bool late = sessions_.has_deadlines() || connections_.has_deadlines();
    return late || engine_.waiting() || engine_.models().pressure().pressed() ? CHECK_MS : -1;
}

void EngineThread::handle(const Epoll::Event& event) {
    switch (event.kind) {
        case Watched::wake_only:
        case Watched::command:  // the loop looks for commands in each turn
            break;
        case Watched::listener:
            connections_.accept();
            break;
        case Watched::connection:
            connections_.greet(static_cast<int>(event.id));
            break;
        case Watched::session:  // its client hung up, spoke, or ended
            sessions_.close(event.id, ring::CLOSED_BY_DAEMON);
            break;
        case Watched::pressure:
            pressure_.handle(static_cast<int>(event.id), event.events);
            break;
    }
}

void EngineThread::check_periodically() {
    const auto now = Clock::now();
    if (now < next_check_) return;
    next_check_ = now + std::chrono::milliseconds(CHECK_MS);
    connections_.accept_again();
    connections_.close_late();
    sessions_.close_late();
    pressure_.relieve_when_quiet();
    engine_.models().rebalance();
}

std::string EngineThread::io_level() {
    const bool buffered = commands_.on_loop([&] {
        const auto& models = engine_.models().all();
        return std::any_of(models.begin(), models.end(),
                           [](const auto& model) { return model->file != nullptr && model->file->buffered(); });
    });
    return reader_->level() + (buffered ? ", through the page cache" : "");
}

Report EngineThread::report() {
    return commands_.on_loop([&] { return report_of(engine_, sessions_, pressure_, Clock::now() - started_); });
}

}  // namespace weightd
