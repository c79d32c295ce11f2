// A client that writes garbage into every shared field at any time, between and during the turns of the engine.
#include "fuzzed_daemon.h"

namespace weightd {
namespace {

class Stranger {
  public:
    Stranger(FuzzedDaemon& daemon, FuzzedDataProvider& input)
        : daemon_(daemon), input_(input), socket_(daemon.socket()) {
        ring::Hello hello{ring::MAGIC, ring::VERSION, {}};
        const Token token = daemon.open_session(input.ConsumeIntegralInRange<uint32_t>(2, 24));
        std::copy(token.begin(), token.end(), hello.token);
        socket_.send({reinterpret_cast<const uint8_t*>(&hello), sizeof hello}, 0);
        ring::Welcome welcome{};
        descriptors_ = socket_.receive(&welcome, sizeof welcome, 60'000);
        require(descriptors_.size() == 3, "ring, doorbell and resident weights");
        void* mapped =
            ::mmap(nullptr, sizeof(ring::Ring), PROT_READ | PROT_WRITE, MAP_SHARED, descriptors_[0].get(), 0);
        require(mapped != MAP_FAILED, "a mapped ring");
        ring_ = static_cast<ring::Ring*>(mapped);
    }

    ~Stranger() { ::munmap(ring_, sizeof(ring::Ring)); }

    void act() {
        using Act = void (Stranger::*)();
        static constexpr std::array<Act, 12> ACTS{&Stranger::post,
                                                  &Stranger::post,
                                                  &Stranger::write_header,
                                                  &Stranger::write_anywhere,
                                                  &Stranger::move_tail,
                                                  &Stranger::read_grants,
                                                  &Stranger::claim_to_have_read,
                                                  &Stranger::ring_doorbell,
                                                  &Stranger::fill_doorbell,
                                                  &Stranger::truncate,
                                                  &Stranger::speak,
                                                  &Stranger::step};
        (this->*ACTS[input_.ConsumeIntegralInRange<size_t>(0, ACTS.size() - 1)])();
    }

  private:
    uint32_t number() {
        return input_.ConsumeBool() ? input_.ConsumeIntegralInRange<uint32_t>(0, 80)
                                    : input_.ConsumeIntegral<uint32_t>();
    }

    void post() {
        const uint32_t index = ring_->header.request_tail.load() % ring::REQUESTS;
        const uint32_t count = input_.ConsumeIntegralInRange<uint32_t>(0, 24);
        for (uint32_t i = 0; i < count; i++) ring_->words[index][i] = number();
        ring::Request request{input_.ConsumeIntegralInRange<uint32_t>(1, 3),
                              input_.ConsumeIntegralInRange<uint32_t>(1, 2),
                              input_.ConsumeIntegralInRange<uint32_t>(0, 1),
                              count,
                              number(),
                              0,
                              {}};
        if (input_.ConsumeBool()) request.release_count = number();
        if (input_.ConsumeBool()) request.word_count = number();
        ring_->requests[index] = request;
        ring_->header.request_tail.fetch_add(1);
    }

    void write_header() {
        const auto at = input_.ConsumeIntegralInRange<size_t>(0, 256 / 4 - 1);
        reinterpret_cast<std::atomic<uint32_t>*>(ring_)[at].store(number());
    }

    void write_anywhere() {
        const auto bytes = input_.ConsumeBytes<uint8_t>(input_.ConsumeIntegralInRange<size_t>(1, 64));
        const auto at = input_.ConsumeIntegralInRange<size_t>(0, sizeof(ring::Ring) - bytes.size());
        std::copy(bytes.begin(), bytes.end(), reinterpret_cast<uint8_t*>(ring_) + at);
    }

    void move_tail() { ring_->header.request_tail.fetch_add(input_.ConsumeIntegralInRange<uint32_t>(0, 70)); }
    void read_grants() { ring_->header.grant_head.store(ring_->header.grant_tail.load()); }
    void claim_to_have_read() { ring_->header.grant_head.store(number()); }

    void ring_doorbell() {
        const uint64_t one = 1;
        if (!blocking_ && ::write(descriptors_[1].get(), &one, sizeof one) < 0) return;
    }

    void fill_doorbell() {
        ::fcntl(descriptors_[1].get(), F_SETFL, O_NONBLOCK);
        const uint64_t full = UINT64_MAX - 2;
        blocking_ = ::write(descriptors_[1].get(), &full, sizeof full) > 0 && input_.ConsumeBool();
        if (blocking_) ::fcntl(descriptors_[1].get(), F_SETFL, 0);
    }

    void truncate() {
        const auto bytes = input_.ConsumeIntegralInRange<off_t>(0, 1 << 20);
        const bool truncated = ::ftruncate(descriptors_[0].get(), bytes) == 0;
        require(!truncated || bytes == off_t{sizeof(ring::Ring)}, "a ring that keeps its size");
        require(::ftruncate(descriptors_[2].get(), 1 << 30) < 0, "no growth");
    }

    void speak() {
        const auto bytes = input_.ConsumeBytes<uint8_t>(input_.ConsumeIntegralInRange<size_t>(0, 40));
        socket_.send(bytes, input_.ConsumeIntegralInRange<size_t>(0, 8));
        if (input_.ConsumeBool()) socket_.hang_up(input_.ConsumeIntegralInRange<int>(0, 2));
    }

    void step() {
        daemon_.step();
        if (input_.ConsumeBool()) daemon_.expect_right_bytes(number());
    }

    FuzzedDaemon& daemon_;
    FuzzedDataProvider& input_;
    StrangeSocket socket_;
    std::vector<Descriptor> descriptors_;
    ring::Ring* ring_ = nullptr;
    bool blocking_ = false;
};

void fuzz(FuzzedDataProvider& input) {
    FuzzedDaemon& daemon = FuzzedDaemon::get();
    {
        Stranger stranger(daemon, input);
        while (input.remaining_bytes() > 0) stranger.act();
        daemon.step();
        daemon.expect_right_bytes(7);
    }
    daemon.expect_nothing_left();
}

}  // namespace
}  // namespace weightd

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    FuzzedDataProvider input(data, size);
    weightd::fuzz(input);
    return 0;
}
