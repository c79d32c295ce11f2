// Signals of memory pressure from the kernel.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "flash_file.h"
#include "service/engine_thread.h"

namespace weightd {
namespace {

struct PressureSignalTest : testing::Test {
    TestFolder folder;
    FlashModel flash{1, 400};

    std::unique_ptr<EngineThread> serve(Descriptor trigger) {
        EngineOptions options{64U << 20, {"threads", 2, 32, false}, folder.file("data"), true, {}};
        options.pressure = {0, {}, std::move(trigger)};
        auto engine = std::make_unique<EngineThread>(std::move(options));
        engine->add_model(flash.spec);
        return engine;
    }
};

// A trigger that was never set polls EPOLLERR for ever, like the trigger of a cgroup that was removed.
TEST_F(PressureSignalTest, ATriggerThatFailsIsDroppedAndCountsAsNoSignal) {
    Descriptor unset(::open("/proc/pressure/memory", O_RDWR | O_NONBLOCK | O_CLOEXEC));
    if (unset.get() < 0) GTEST_SKIP() << "this kernel does not report memory pressure";
    const auto engine = serve(std::move(unset));
    std::vector<std::byte> cell(4096);
    engine->fetch(0, 0, std::array{3U}, cell);
    EXPECT_EQ(std::memcmp(cell.data(), flash.cell(0, 3), 4096), 0);
    const Report report = engine->report();
    EXPECT_EQ(report.memory_pressure.signals, 0U);
    EXPECT_FALSE(report.memory_pressure.pressed);
}

}  // namespace
}  // namespace weightd
