#include "kernels/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <asm/prctl.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>
#include <string_view>

namespace flashclient {
namespace {

// Tiles of bf16 and of bytes, which Linux allows a process on request. It refuses if a thread's stack for signals is
// too small.
bool amx_is_granted() {
#if defined(__x86_64__) && defined(SYS_arch_prctl) && defined(ARCH_REQ_XCOMP_PERM)
    constexpr unsigned FEATURES_LEAF = 7;
    constexpr unsigned AMX_BF16 = 1U << 22, AMX_TILE = 1U << 24, AMX_INT8 = 1U << 25;  // of edx
    constexpr long TILE_DATA = 18;  // component of the processor's state
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(FEATURES_LEAF, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    if ((edx & AMX_BF16) == 0 || (edx & AMX_TILE) == 0 || (edx & AMX_INT8) == 0) return false;
    return ::syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
    return false;
#endif
}

bool processor_has(std::string_view instruction_set) {
    if (instruction_set == "portable") return true;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    if (instruction_set == "avx2") return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (instruction_set == "avx512") return avx512;
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("bmi2");
    if (instruction_set == "avx512_vnni") return vnni;
    if (instruction_set == "avx512_bf16") return vnni && __builtin_cpu_supports("avx512bf16");
    if (instruction_set == "amx") {
        static const bool granted = amx_is_granted();
        return vnni && granted;
    }
#endif
    return false;
}

std::string block_format_names() {
    std::string names;
    for (const auto& record : weightd::BLOCK_FORMATS) names += (names.empty() ? "" : ", ") + std::string(record.name);
    return names;
}

template <typename Stored>
const Kernels& table_of(Stored stored, std::string_view instruction_set) {
    if (instruction_set == "amx") return *kernels_amx(stored);
    if (instruction_set == "avx512_bf16") return *kernels_bf16(stored);
    if (instruction_set == "avx512_vnni") return *kernels_vnni(stored);
    if (instruction_set == "avx512") return *kernels_avx512(stored);
    if (instruction_set == "avx2") return *kernels_avx2(stored);
    return *kernels_portable(stored);
}

// `stored`: a Dtype or a BlockFormat.
template <typename Stored>
const Kernels& best_or_named(Stored stored, const char* instruction_set) {
    if (instruction_set != nullptr) {
        if (!processor_has(instruction_set)) {
            throw std::invalid_argument(
                "instruction set '" + std::string(instruction_set) +
                "' is unknown or not in this processor: pick amx, avx512_bf16, avx512_vnni, avx512, avx2 or portable");
        }
        return table_of(stored, instruction_set);
    }
    for (const char* name : {"amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2"}) {
        if (processor_has(name)) return table_of(stored, name);
    }
    return table_of(stored, "portable");
}

}  // namespace

const Kernels& kernels_for(Dtype dtype, const char* instruction_set) { return best_or_named(dtype, instruction_set); }

const Kernels& kernels_for(BlockFormat format, const char* instruction_set) {
    return best_or_named(format, instruction_set);
}

const Kernels& kernels_for(const Encoding& encoding, const char* instruction_set) {
    if (const auto format = encoding.block_format()) return kernels_for(*format, instruction_set);
    const std::optional<Dtype> dtype = encoding.plain();
    if (!dtype || *dtype == Dtype::i8) {
        throw std::invalid_argument("no kernel for weights of encoding '" + encoding.format + "': F32, BF16, F16, " +
                                    block_format_names() + " have one");
    }
    return kernels_for(*dtype, instruction_set);
}

}  // namespace flashclient
