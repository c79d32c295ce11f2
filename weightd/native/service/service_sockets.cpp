// The data socket: who connects, says Hello and is attached to its session.
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "service/engine_thread.h"

namespace weightd {
namespace {

constexpr uint32_t ACCEPTS_MAX = 16;  // in one turn of the loop

std::optional<ucred> peer_of(int socket) {
    ucred peer{};
    socklen_t bytes = sizeof peer;
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) < 0) return std::nullopt;
    return peer;
}

}  // namespace

Descriptor EngineThread::listen_at(const std::string& path) {
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
        ::listen(listener.get(), SOMAXCONN) < 0) {
        fail(path);
    }
    return listener;
}

void EngineThread::accept_connections() {
    for (uint32_t i = 0; i < ACCEPTS_MAX; i++) {  // then the others have their turn
        Descriptor socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (socket.get() < 0 && out_of_descriptors(errno)) listen(false);  // else it would be ready for ever
        if (socket.get() < 0) return;
        add_connection(std::move(socket));
    }
}

void EngineThread::add_connection(Descriptor socket) {
    const int fd = socket.get();
    const auto peer = peer_of(fd);
    if (!peer) return;
    try {
        watch(fd, event_data(CONNECTION, static_cast<uint32_t>(fd)), EPOLLIN | EPOLLRDHUP);
    } catch (const std::system_error&) {
        return;  // the system's limit of watches: this client sees that it is hung up on
    }
    connections_[fd] = std::move(socket);
    const auto given_up = silent_.begin(static_cast<uint32_t>(fd), peer->uid, Clock::now());
    if (given_up) connections_.erase(static_cast<int>(*given_up));
}

void EngineThread::listen(bool accepts) {
    if (accepts == accepts_) return;
    accepts_ = accepts;
    epoll_event event{};
    event.events = accepts ? uint32_t{EPOLLIN} : 0;
    event.data.u64 = event_data(LISTENER, 0);
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, listener_.get(), &event) < 0) fail("epoll_ctl");
}

void EngineThread::greet(int fd) {
    const auto found = connections_.find(fd);
    if (found == connections_.end()) return;
    ring::Hello hello{};
    const ssize_t got = ::recv(fd, &hello, sizeof hello, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    Descriptor socket = std::move(found->second);
    connections_.erase(found);
    silent_.end(static_cast<uint32_t>(fd));
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

void EngineThread::attach(Descriptor socket, RingSession& session) {
    const int fd = socket.get();
    const auto peer = peer_of(fd);
    if (!peer || !session.is_for(peer->uid)) return refuse(fd, EPERM);
    Descriptor process = process_of(fd, *peer);
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
    const Model& state = engine_->model(session.model);
    unattached_.end(session.id);
    if (!session.attach(std::move(socket), std::move(process), *peer, state.spec.resident_bytes,
                        state.resident.shared_fd())) {
        close_session(session.id, ring::CLOSED_BY_DAEMON);
    }
}

void EngineThread::refuse(int fd, int error) {
    const ring::Welcome welcome{ring::MAGIC, ring::VERSION, 0, 0, 0, static_cast<uint32_t>(error)};
    send_with_descriptors(fd, &welcome, sizeof welcome, {});
}

}  // namespace weightd
