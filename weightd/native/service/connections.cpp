#include "service/connections.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "device/system_error.h"

namespace weightd {
namespace {

constexpr uint32_t SILENT_MAX = 64;  // connections
constexpr std::chrono::seconds HELLO_WITHIN{10};
constexpr uint32_t ACCEPTS_MAX = 16;  // in one turn of the loop

Descriptor listen_at(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) fail(path, ENAMETOOLONG);
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    Descriptor listener(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    ::unlink(path.c_str());
    if (listener.get() < 0 || ::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) < 0 ||
        ::listen(listener.get(), SOMAXCONN) < 0) {
        fail(path);
    }
    return listener;
}

void refuse(int fd, int error) {
    const ring::Welcome welcome{ring::MAGIC, ring::VERSION, 0, 0, 0, static_cast<uint32_t>(error)};
    send_with_descriptors(fd, &welcome, sizeof welcome, {});
}

}  // namespace

Connections::Connections(const std::string& path, Epoll& epoll, RingSessions& sessions)
    : path_(path), epoll_(epoll), sessions_(sessions), listener_(listen_at(path)), silent_(SILENT_MAX, HELLO_WITHIN) {
    epoll_.watch(listener_.get(), Watched::listener, 0, EPOLLIN);
}

void Connections::remove_socket() { ::unlink(path_.c_str()); }

void Connections::accept() {
    for (uint32_t i = 0; i < ACCEPTS_MAX; i++) {  // then other events are handled
        Descriptor socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (socket.get() < 0 && out_of_descriptors(errno)) listen(false);  // else it would be ready for ever
        if (socket.get() < 0) return;
        add(std::move(socket));
    }
}

void Connections::add(Descriptor socket) {
    const int fd = socket.get();
    const auto peer = peer_of(fd);
    if (!peer) return;
    try {
        epoll_.watch(fd, Watched::connection, static_cast<uint32_t>(fd), EPOLLIN | EPOLLRDHUP);
    } catch (const std::system_error&) {
        return;  // the system's limit of watches is reached: this client sees that its connection ends
    }
    connections_[fd] = std::move(socket);
    const auto given_up = silent_.begin(static_cast<uint32_t>(fd), peer->uid, Clock::now());
    if (given_up) connections_.erase(static_cast<int>(*given_up));
}

void Connections::accept_again() { listen(true); }

void Connections::listen(bool accepts) {
    if (accepts == accepts_) return;
    accepts_ = accepts;
    epoll_.change(listener_.get(), Watched::listener, 0, accepts ? uint32_t{EPOLLIN} : 0);
}

void Connections::greet(int fd) {
    const auto found = connections_.find(fd);
    if (found == connections_.end()) return;
    ring::Hello hello{};
    const ssize_t got = ::recv(fd, &hello, sizeof hello, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    Descriptor socket = std::move(found->second);
    connections_.erase(found);
    silent_.end(static_cast<uint32_t>(fd));
    epoll_.unwatch(fd);
    if (got != sizeof hello || hello.magic != ring::MAGIC) return;
    if (hello.version != ring::VERSION) return refuse(fd, EPROTO);
    Token token;
    std::copy(std::begin(hello.token), std::end(hello.token), token.begin());
    RingSession* session = sessions_.find(token);
    if (session == nullptr) return refuse(fd, ENOENT);
    const int error = sessions_.attach(socket, *session);
    if (error != 0) refuse(fd, error);
}

void Connections::close_late() {
    for (const uint32_t fd : silent_.remove_expired(Clock::now())) connections_.erase(static_cast<int>(fd));
}

}  // namespace weightd
