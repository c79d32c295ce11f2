#include "kernels/activation.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace flashclient {
namespace {

constexpr std::pair<std::string_view, Function> FUNCTIONS[] = {
    {"fatrelu", Function::fatrelu},
    {"gated_relu", Function::gated_relu},
    {"gelu", Function::gelu},
    {"gelu_tanh", Function::gelu_tanh},
    {"hardswish", Function::hardswish},
    {"laplace", Function::laplace},
    {"leaky_relu", Function::leaky_relu},
    {"linear", Function::linear},
    {"mish", Function::mish},
    {"relu", Function::relu},
    {"relu_squared", Function::relu_squared},
    {"sigmoid", Function::sigmoid},
    {"silu", Function::silu},
    {"sqrtsoftplus", Function::sqrtsoftplus},
    {"swish", Function::swish},
    {"tanh", Function::tanh},
    {"xielu", Function::xielu},
};

// What the logistic function of which, times v, is function(v): for those that are computed so.
bool logistic_argument(Function function, const Parameters& parameters, const float* values, size_t count, float* out) {
    switch (function) {
        case Function::silu:
            std::copy_n(values, count, out);
            return true;
        case Function::swish:
            for (size_t i = 0; i < count; i++) out[i] = parameters[0] * values[i];
            return true;
        case Function::gelu_tanh:  // (1 + tanh(u)) / 2 is the logistic function of 2 u
            for (size_t i = 0; i < count; i++) {
                const float v = values[i];
                out[i] = 1.59576912160573072f * (v + 0.044715f * v * v * v);
            }
            return true;
        default:
            return false;
    }
}

}  // namespace

void activate_all(const Activation& activation, const Kernels& kernels, float* values, size_t count) {
    constexpr size_t SOME = 256;
    const auto& [function, parameters, factor, gate_max, activation_max, up_limit, up_offset] = activation;
    for (size_t first = 0; first < count; first += SOME) {
        const size_t some = std::min(SOME, count - first);
        float* of_some = values + first;
        float gate[SOME];
        for (size_t i = 0; i < some; i++) of_some[i] = std::min(factor * of_some[i], gate_max);
        if (logistic_argument(function, parameters, of_some, some, gate)) {
            kernels.logistic(gate, some);
            for (size_t i = 0; i < some; i++) of_some[i] *= gate[i];
        } else if (function == Function::relu || function == Function::gated_relu) {  // a loop of vectors
            for (size_t i = 0; i < some; i++) of_some[i] = of_some[i] < 0.0f ? 0.0f : of_some[i];
        } else {
            for (size_t i = 0; i < some; i++) of_some[i] = apply(function, parameters, of_some[i]);
        }
        for (size_t i = 0; i < some; i++) of_some[i] = std::min(of_some[i], activation_max);
    }
}

std::vector<std::string_view> function_names() {
    std::vector<std::string_view> names;
    for (const auto& [name, function] : FUNCTIONS) names.push_back(name);
    return names;
}

Function function_named(std::string_view wanted) {
    std::string known;
    for (const auto& [name, function] : FUNCTIONS) {
        if (name == wanted) return function;
        known += (known.empty() ? "" : ", ") + std::string(name);
    }
    throw std::invalid_argument("no kernel for activation '" + std::string(wanted) + "': " + known + " have one");
}

}  // namespace flashclient
