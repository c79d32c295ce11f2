#include "service/fetches.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <system_error>

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

    void ask(size_t count) {
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

    // All answers. Throws Stopping, and Unanswered once none has come for `within`.
    std::vector<Answer> wait(const Commands& commands, std::chrono::milliseconds within) {
        std::unique_lock guard(lock_);
        while (!answered_.wait_for(guard, STOP_CHECK, [this] { return owed_ == 0; })) {
            if (commands.stopping()) throw Stopping();
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

void Fetches::cells(uint32_t model, uint32_t layer, std::span<const uint32_t> cells, std::span<std::byte> out) {
    const ModelSpec& spec = openings_.activate(model, Use::cells, std::nullopt).spec;
    FetchSession* session = nullptr;
    const auto end = [&] {
        commands_.on_loop([&] {
            if (session != nullptr) engine_.close(session->id);
            engine_.models().note_fetch(model);
            engine_.models().leave(model);
        });
    };
    try {
        commands_.on_loop([&] {
            const auto wanted = static_cast<uint32_t>(std::clamp<size_t>(cells.size(), 1, FETCH_SLOTS_MAX));
            const uint32_t share = engine_.models().share_for(model, wanted);
            session = static_cast<FetchSession*>(&engine_.open(std::make_unique<FetchSession>(spec, model, share)));
        });
        for (size_t first = 0; first < cells.size(); first += session->share_slots) {
            const auto batch = cells.subspan(first, std::min<size_t>(session->share_slots, cells.size() - first));
            session->ask(batch.size());
            commands_.on_loop([&] {
                for (uint32_t i = 0; i < batch.size(); i++) {
                    if (!engine_.acquire(*session, layer, batch.subspan(i, 1), i)) {
                        throw std::out_of_range(spec.name + ": no such layer or cell");
                    }
                }
            });
            const auto answers = session->wait(commands_, answer_within_);
            for (size_t i = 0; i < batch.size(); i++) {
                require_good(spec, layer, batch[i], answers[i]);
                std::memcpy(out.data() + (first + i) * spec.cell_bytes, answers[i].address, spec.cell_bytes);
            }
            commands_.on_loop([&] { engine_.release(*session, layer, batch); });
        }
    } catch (...) {
        end();
        throw;
    }
    end();
}

void Fetches::resident(uint32_t model, uint64_t offset_bytes, std::span<std::byte> out) {
    const Model& active = openings_.activate(model, Use::resident, std::nullopt);
    const uint64_t bytes = active.spec.resident_bytes;
    const bool inside = offset_bytes <= bytes && out.size() <= bytes - offset_bytes;
    if (inside) std::memcpy(out.data(), active.resident.data() + offset_bytes, out.size());
    openings_.leave(model);
    if (!inside) throw std::out_of_range(active.spec.name + ": beyond the end of the resident weights");
}

}  // namespace weightd
