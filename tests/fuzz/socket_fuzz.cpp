// Clients that greet the data socket with garbage, twice, with descriptors, or not at all.
#include "fuzzed_daemon.h"

namespace weightd {
namespace {

// Clients, and the tokens that they were given.
struct Strangers {
    std::vector<StrangeSocket> sockets;
    std::vector<Token> tokens;
};

ring::Hello hello_with(const Token& token) {
    ring::Hello hello{ring::MAGIC, ring::VERSION, {}};
    std::copy(token.begin(), token.end(), hello.token);
    return hello;
}

Token open_session(FuzzedDaemon& daemon, Strangers& strangers, uint32_t slots) {
    try {
        strangers.tokens.push_back(daemon.open_session(slots));
        return strangers.tokens.back();
    } catch (const NoRoom&) {
        return {};
    }
}

void greet(FuzzedDaemon& daemon, Strangers& strangers, StrangeSocket& socket, FuzzedDataProvider& input) {
    Token token{};
    if (input.ConsumeBool()) token = open_session(daemon, strangers, input.ConsumeIntegral<uint32_t>());
    ring::Hello hello = hello_with(token);
    if (input.ConsumeBool()) hello.version = input.ConsumeIntegral<uint32_t>();
    std::vector<uint8_t> bytes(sizeof hello);
    std::memcpy(bytes.data(), &hello, sizeof hello);
    if (input.ConsumeBool()) bytes[input.ConsumeIntegralInRange<size_t>(0, bytes.size() - 1)] ^= 1;
    if (input.ConsumeBool()) bytes.resize(input.ConsumeIntegralInRange<size_t>(0, 4096));
    socket.send(bytes, input.ConsumeIntegralInRange<size_t>(0, 16));
}

void act(FuzzedDaemon& daemon, Strangers& strangers, FuzzedDataProvider& input) {
    std::vector<StrangeSocket>& sockets = strangers.sockets;
    static constexpr size_t SOCKETS_MAX = 8;
    const auto kind = input.ConsumeIntegralInRange<int>(0, 6);
    if (kind == 0 && sockets.size() < SOCKETS_MAX) sockets.emplace_back(daemon.socket());
    if (sockets.empty()) return;
    StrangeSocket& socket = sockets[input.ConsumeIntegralInRange<size_t>(0, sockets.size() - 1)];
    ring::Welcome welcome{};
    switch (kind) {
        case 1:
        case 2:
            return greet(daemon, strangers, socket, input);
        case 3:
            return socket.send(input.ConsumeBytes<uint8_t>(input.ConsumeIntegralInRange<size_t>(0, 300)),
                               input.ConsumeIntegralInRange<size_t>(0, 16));
        case 4:
            socket.receive(&welcome, sizeof welcome, 0);
            return;
        case 5:
            return socket.hang_up(input.ConsumeIntegralInRange<int>(0, 2));
        case 6:
            return socket.close();
        default:
            return daemon.expect_right_bytes(input.ConsumeIntegral<uint32_t>());
    }
}

// A token that nobody used would keep its session for seconds.
void use_up(FuzzedDaemon& daemon, const Token& token) {
    StrangeSocket socket(daemon.socket());
    const ring::Hello hello = hello_with(token);
    socket.send({reinterpret_cast<const uint8_t*>(&hello), sizeof hello}, 0);
    ring::Welcome welcome{};
    socket.receive(&welcome, sizeof welcome, 60'000);
}

void fuzz(FuzzedDataProvider& input) {
    FuzzedDaemon& daemon = FuzzedDaemon::get();
    {
        Strangers strangers;
        while (input.remaining_bytes() > 0) act(daemon, strangers, input);
        strangers.sockets.clear();
        for (const Token& token : strangers.tokens) use_up(daemon, token);
    }
    daemon.expect_right_bytes(7);
    daemon.expect_nothing_left();
}

}  // namespace
}  // namespace weightd

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    FuzzedDataProvider input(data, size);
    weightd::fuzz(input);
    return 0;
}
