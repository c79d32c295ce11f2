#include "service/pressure_signals.h"

#include <fstream>
#include <map>
#include <string>

namespace weightd {
namespace {

constexpr std::chrono::seconds RELIEVE_AFTER{10};  // without a signal; under pressure the kernel sends one every 2 s

// Whether less than an eighth of this machine's memory is available. False where /proc does not tell.
bool machine_is_short() {
    std::ifstream lines("/proc/meminfo");
    std::map<std::string, uint64_t> fields;  // in kB
    std::string name;
    std::string rest;
    for (uint64_t amount = 0; lines >> name >> amount && std::getline(lines, rest);) fields[name] = amount;
    return fields["MemAvailable:"] < fields["MemTotal:"] / 8;
}

}  // namespace

PressureSignals::PressureSignals(PressureChoice choice, Epoll& epoll, Engine& engine)
    : choice_(std::move(choice)), epoll_(epoll), engine_(engine) {
    engine_.models().set_floor(choice_.floor_bytes);
    for (const int fd : {choice_.machine.get(), choice_.cgroup.get()}) {
        if (fd >= 0) epoll_.watch(fd, Watched::pressure, static_cast<uint32_t>(fd), EPOLLPRI);
    }
}

void PressureSignals::handle(int fd, uint32_t events) {
    if ((events & EPOLLERR) != 0) return epoll_.unwatch(fd);  // its cgroup has gone: it would be ready for ever
    if (fd == choice_.machine.get() && !machine_is_short()) return;
    count_++;
    relieve_at_ = Clock::now() + RELIEVE_AFTER;
    engine_.models().press();
}

void PressureSignals::relieve_when_quiet() {
    if (engine_.models().pressure().pressed() && Clock::now() > relieve_at_) engine_.models().relieve();
}

}  // namespace weightd
