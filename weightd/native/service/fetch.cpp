// Cells in-band: a session inside the daemon, for what goes over gRPC.
#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <system_error>

#include "service/engine_thread.h"

namespace weightd {
namespace {

constexpr std::chrono::milliseconds STOP_CHECK{200};

class FetchSession final : public Session {
  public:
    FetchSession(const ModelSpec& spec, uint32_t model, uint32_t share)
        : Session(model, spec.cell_count(), share), model_(spec.name) {}

    struct Answer {
        const std::byte* address = nullptr;
        ring::Status status = ring::GRANTED;
        uint32_t detail = 0;
    };

    void expect(size_t count) {
        const std::lock_guard guard(lock_);
        answers_.assign(count, {});
        owed_ = count;
        answered_at_ = Clock::now();
    }

    void granted(uint32_t tag, uint32_t, Place place, const Pool& pool) override {
        answer(tag, {pool.address(place), ring::GRANTED, 0});
    }

    void failed(uint32_t tag, uint32_t, ring::Status status, uint32_t detail) override {
        answer(tag, {nullptr, status, detail});
    }

    void flush() override { answered_.notify_one(); }

    // All answers; throws Unanswered once none has come for `within`.
    template <typename IsStopping>
    std::vector<Answer> wait(IsStopping stopping, std::chrono::milliseconds within) {
        std::unique_lock guard(lock_);
        while (!answered_.wait_for(guard, STOP_CHECK, [this] { return owed_ == 0; })) {
            if (stopping()) throw Stopping();
            if (Clock::now() - answered_at_ > within) throw Unanswered(model_, within);
        }
        return answers_;
    }

  private:
    void answer(uint32_t tag, Answer answer) {
        const std::lock_guard guard(lock_);
        answers_[tag] = answer;
        owed_--;
        answered_at_ = Clock::now();
    }

    const std::string model_;
    std::mutex lock_;  // guards answers_, owed_, answered_at_
    std::condition_variable answered_;
    std::vector<Answer> answers_;
    size_t owed_ = 0;
    Clock::time_point answered_at_;
};

void require_good(const ModelSpec& spec, uint32_t layer, uint32_t cell, const FetchSession::Answer& answer) {
    if (answer.status == ring::UNREADABLE) {
        throw CorruptBundle(spec.name, layer, cell * spec.bundles_per_cell, static_cast<int>(answer.detail));
    }
    if (answer.status == ring::CORRUPT) {
        throw CorruptBundle(spec.name, layer, cell * spec.bundles_per_cell + answer.detail);
    }
}

}  // namespace

CorruptBundle::CorruptBundle(const std::string& model, uint32_t layer, uint32_t position, int error)
    : std::runtime_error(
          "model " + model + ", layer " + std::to_string(layer) + ", position " + std::to_string(position) +
          ": the bundle " +
          (error == 0 ? "differs from its checksum" : "cannot be read: " + std::generic_category().message(error))),
      layer(layer),
      position(position),
      error(error) {}

void EngineThread::fetch(uint32_t model, uint32_t layer, std::span<const uint32_t> cells, std::span<std::byte> out) {
    ensure_active(model, Use::cells, std::nullopt);
    const ModelSpec& spec = this->model(model).spec;
    FetchSession* session = nullptr;
    const auto end = [&] {
        on_loop([&] {
            if (session != nullptr) engine_->close(session->id);
            engine_->models().leave(model);
        });
    };
    try {
        on_loop([&] {
            const auto wanted = static_cast<uint32_t>(std::clamp<size_t>(cells.size(), 1, FETCH_SLOTS_MAX));
            const uint32_t share = engine_->models().share_for(model, wanted);
            session = static_cast<FetchSession*>(&engine_->open(std::make_unique<FetchSession>(spec, model, share)));
        });
        for (size_t first = 0; first < cells.size(); first += session->share_slots) {
            const auto batch = cells.subspan(first, std::min<size_t>(session->share_slots, cells.size() - first));
            session->expect(batch.size());
            on_loop([&] {
                for (uint32_t i = 0; i < batch.size(); i++) {
                    if (!engine_->acquire(*session, layer, batch.subspan(i, 1), i)) {
                        throw std::out_of_range(spec.name + ": no such layer or cell");
                    }
                }
            });
            const auto answers = session->wait([this] { return stopping(); }, choice_.answer_within);
            for (size_t i = 0; i < batch.size(); i++) {
                require_good(spec, layer, batch[i], answers[i]);
                std::memcpy(out.data() + (first + i) * spec.cell_bytes, answers[i].address, spec.cell_bytes);
            }
            on_loop([&] { engine_->release(*session, layer, batch); });
        }
    } catch (...) {
        end();
        throw;
    }
    end();
}

void EngineThread::fetch_resident(uint32_t model, uint64_t offset_bytes, std::span<std::byte> out) {
    ensure_active(model, Use::resident, std::nullopt);
    const Model& state = this->model(model);
    const bool inside =
        offset_bytes <= state.spec.resident_bytes && out.size() <= state.spec.resident_bytes - offset_bytes;
    if (inside) std::memcpy(out.data(), state.resident.data() + offset_bytes, out.size());
    on_loop([&] { engine_->models().leave(model); });
    if (!inside) throw std::out_of_range(state.spec.name + ": beyond the end of the resident weights");
}

}  // namespace weightd
