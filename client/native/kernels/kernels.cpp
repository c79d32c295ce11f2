#include "kernels/kernels.h"

#include <stdexcept>
#include <string>
#include <string_view>

namespace flashclient {
namespace {

bool processor_has(std::string_view instruction_set) {
    if (instruction_set == "portable") return true;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    if (instruction_set == "avx2") return avx2;
    if (instruction_set == "avx512") {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
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
    if (instruction_set == "avx512") return *kernels_avx512(stored);
    if (instruction_set == "avx2") return *kernels_avx2(stored);
    return *kernels_portable(stored);
}

// `stored`: a Dtype or a BlockFormat.
template <typename Stored>
const Kernels& best_or_named(Stored stored, const char* instruction_set) {
    if (instruction_set != nullptr) {
        if (!processor_has(instruction_set)) {
            throw std::invalid_argument("instruction set '" + std::string(instruction_set) +
                                        "' is unknown or not in this processor: pick avx512, avx2 or portable");
        }
        return table_of(stored, instruction_set);
    }
    for (const char* name : {"avx512", "avx2"}) {
        if (processor_has(name)) return table_of(stored, name);
    }
    return table_of(stored, "portable");
}

}  // namespace

const Kernels& kernels_for(Dtype dtype, const char* instruction_set) { return best_or_named(dtype, instruction_set); }

const Kernels& kernels_for(const Encoding& encoding, const char* instruction_set) {
    if (const auto format = encoding.block_format()) return best_or_named(*format, instruction_set);
    const std::optional<Dtype> dtype = encoding.plain();
    if (!dtype || *dtype == Dtype::i8) {
        throw std::invalid_argument("no kernel for weights of encoding '" + encoding.format +
                                    "': F32, BF16, F16 and GGML's " + block_format_names() + " have one");
    }
    return kernels_for(*dtype, instruction_set);
}

}  // namespace flashclient
