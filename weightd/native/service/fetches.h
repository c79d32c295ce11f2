// Cells and resident weights as bytes, for what goes over gRPC. A fetch is a session inside the daemon.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "engine/engine.h"
#include "service/commands.h"
#include "service/openings.h"

namespace weightd {

struct CorruptBundle : std::runtime_error {  // a checksum differs, or flash cannot be read
    CorruptBundle(const std::string& model, uint32_t layer, uint32_t position, int error = 0);
    uint32_t layer;
    uint32_t position;  // of the first bundle of its cell, if that cannot be read
    int error;          // errno of the read, or 0
};

class Fetches {
  public:
    Fetches(Commands& commands, Engine& engine, Openings& openings, std::chrono::milliseconds answer_within)
        : commands_(commands), engine_(engine), openings_(openings), answer_within_(answer_within) {}

    // In the callers' threads. They throw what Openings::activate() throws, and std::out_of_range.

    // Whole cells of `layer`, back to back in the order asked. Throws CorruptBundle.
    void cells(uint32_t model, uint32_t layer, std::span<const uint32_t> cells, std::span<std::byte> out);
    void resident(uint32_t model, uint64_t offset_bytes, std::span<std::byte> out);

  private:
    Commands& commands_;
    Engine& engine_;
    Openings& openings_;
    const std::chrono::milliseconds answer_within_;
};

}  // namespace weightd
