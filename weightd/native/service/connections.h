// The data socket: processes connect to it, say Hello, and are attached to their sessions.
//
// Belongs to the engine's thread. Nothing here waits for a client.
#pragma once

#include <map>
#include <string>

#include "session/epoll.h"
#include "session/half_open.h"
#include "session/ring_sessions.h"

namespace weightd {

class Connections {
  public:
    // Listens at `path`. Throws std::system_error.
    Connections(const std::string& path, Epoll& epoll, RingSessions& sessions);

    void accept();        // the listener is ready
    void greet(int fd);   // a connection has a message, or has ended
    void accept_again();  // after a time without free descriptors
    void close_late();    // connections that have not said Hello in time
    bool has_deadlines() const { return !silent_.empty() || !accepts_; }
    void close_all() { connections_.clear(); }
    void remove_socket();

  private:
    void add(Descriptor socket);
    void listen(bool accepts);

    const std::string path_;
    Epoll& epoll_;
    RingSessions& sessions_;
    Descriptor listener_;
    bool accepts_ = true;                    // false while no descriptor is left for a connection
    HalfOpen silent_;                        // of connections_: all
    std::map<int, Descriptor> connections_;  // by descriptor, that have not said Hello yet
};

}  // namespace weightd
