// A model without files, a session that counts what it is told, and a reader that reads nothing.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/reader.h"
#include "memory/model.h"
#include "memory/session.h"

namespace weightd {

inline constexpr uint32_t BARE_CELL_BYTES = 4096;

inline ModelSpec bare_spec(const std::string& name, uint32_t cells) {
    ModelSpec spec;
    spec.name = name;
    spec.cell_bytes = spec.stride_bytes = spec.bundle_bytes = BARE_CELL_BYTES;
    spec.bundles_per_cell = 1;
    spec.resident_bytes = 8192;
    spec.layers.push_back({0, cells, cells, 0, 0});
    return spec;
}

// Adds a model of so many cells, which is active and has one user, but no slots.
inline Model& add_active(ModelList& models, uint32_t cells) {
    auto model = std::make_unique<Model>();
    model->index = static_cast<uint32_t>(models.size());
    model->spec = bare_spec("model" + std::to_string(model->index), cells);
    model->pool = std::make_unique<Pool>(cells, BARE_CELL_BYTES);
    model->users = 1;
    models.push_back(std::move(model));
    return *models.back();
}

inline void add_slots(Model& model, uint32_t slots) {
    static uint32_t number = 1'000'000;
    model.pool->add_segment(number++, {"test", size_t{slots} * BARE_CELL_BYTES});
}

// Counts what it is told.
class CountingSession final : public Session {
  public:
    using Session::Session;
    void granted(uint32_t, uint32_t, Place, const Pool&) override { grants++; }
    void failed(uint32_t, uint32_t, ring::Status status, uint32_t) override { failures[status]++; }
    void flush() override {}
    void segment_gone(uint32_t segment) override { gone.push_back(segment); }
    void limit_changed(uint32_t limit) override { told_limit = limit; }
    uint32_t grants = 0;
    std::map<ring::Status, uint32_t> failures;
    std::vector<uint32_t> gone;  // segments
    uint32_t told_limit = 0;
};

class IdleReader final : public Reader {
  public:
    std::string level() const override { return "idle"; }
    int register_file(const DirectFile&) override { return -1; }
    void unregister_file(int) override {}
    int register_memory(std::span<std::byte>) override { return ++registered; }
    void pin_memory(int) override { pinned++; }
    void unregister_memory(int) override { registered--; }
    void submit(std::vector<Read>) override {}
    void reap(std::vector<Completion>&) override {}
    void wait() override {}
    ReadQueue queue() const override { return {}; }
    int event_fd() const override { return -1; }
    int registered = 0;
    int pinned = 0;  // since the start
};

}  // namespace weightd
