// The activations of FFNs: their names and formulas.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string_view>
#include <vector>

#include "kernels/kernels.h"

namespace flashclient {

// Of v, a neuron's product with its gate row:
//   relu          max(v, 0)
//   relu_squared  relu(v)^2 (Persimmon, Nemotron)
//   fatrelu       v above the parameter, else 0 (ProSparse, arXiv 2402.13516)
//   silu          v * sigmoid(v)
//   swish         v * sigmoid(parameter * v) (arXiv 1710.05941; gpt-oss; quick_gelu with 1.702)
//   gelu          v * Phi(v), by erf
//   gelu_tanh     its approximation by tanh
//   gated_relu    relu of gate and of up (dReLU: TurboSparse, arXiv 2406.05955; Bamboo)
//   xielu         p v^2 + b v above zero, n (exp(min(v, e)) - 1 - v) + b v below; parameters p, n, b, e (Apertus;
//                 arXiv 2411.13010)
//   leaky_relu    v, times the parameter below zero
//   hardswish     v * min(max(v + 3, 0), 6) / 6
//   laplace       (1 + erf((v - 0.707107) / (0.282095 sqrt(2)))) / 2 (arXiv 2209.10655)
//   mish          v * tanh(log(1 + exp(v)))
//   sqrtsoftplus  sqrt(log(1 + exp(v)))
//   sigmoid, tanh, linear
enum class Function {
    relu,
    relu_squared,
    fatrelu,
    silu,
    swish,
    gelu,
    gelu_tanh,
    gated_relu,
    xielu,
    leaky_relu,
    hardswish,
    laplace,
    mish,
    sqrtsoftplus,
    sigmoid,
    tanh,
    linear,
};

// Throws std::invalid_argument, which lists the known names.
Function function_named(std::string_view name);
std::vector<std::string_view> function_names();

using Parameters = std::array<float, 4>;

// What a neuron makes of its products with its gate row and its up row; the message Activation of weightd.proto.
struct Activation {
    Function function;
    Parameters parameters{};
    float gate_factor = 1.0f;
    float gate_max = std::numeric_limits<float>::infinity();
    float activation_max = std::numeric_limits<float>::infinity();
    float up_limit = std::numeric_limits<float>::infinity();
    float up_offset = 0.0f;
};

// log(1 + exp(v))
inline float softplus(float v) { return v > 20.0f ? v : std::log1p(std::exp(v)); }

// function(v) in fp32; gelu and gelu_tanh as torch.nn.functional.gelu has them.
inline float apply(Function function, const Parameters& parameters, float v) {
    switch (function) {
        case Function::relu:
        case Function::gated_relu:
            return v < 0.0f ? 0.0f : v;
        case Function::relu_squared:
            return v < 0.0f ? 0.0f : v * v;
        case Function::fatrelu:
            return v <= parameters[0] ? 0.0f : v;
        case Function::silu:
            return v / (1.0f + std::exp(-v));
        case Function::swish:
            return v / (1.0f + std::exp(-parameters[0] * v));
        case Function::gelu:
            return 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
        case Function::gelu_tanh:
            return 0.5f * v * (1.0f + std::tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
        case Function::xielu: {
            const auto [positive, negative, slope, below] = parameters;
            return (v > 0.0f ? positive * v * v : negative * (std::expm1(v > below ? below : v) - v)) + slope * v;
        }
        case Function::leaky_relu:
            return v < 0.0f ? parameters[0] * v : v;
        case Function::hardswish:
            return v * std::clamp(v + 3.0f, 0.0f, 6.0f) / 6.0f;
        case Function::laplace:
            return 0.5f * (1.0f + std::erf((v - 0.707107f) / 0.39894256f));
        case Function::mish:
            return v * std::tanh(softplus(v));
        case Function::sqrtsoftplus:
            return std::sqrt(softplus(v));
        case Function::sigmoid:
            return 1.0f / (1.0f + std::exp(-v));
        case Function::tanh:
            return std::tanh(v);
        case Function::linear:
            return v;
    }
    return v;
}

// Of the product with the gate row; of that with the up row, if there is no gate. A NaN stays one.
inline float activate(const Activation& activation, float v) {
    const float gate = std::min(activation.gate_factor * v, activation.gate_max);
    return std::min(apply(activation.function, activation.parameters, gate), activation.activation_max);
}

// activate() of each value, in place, but for rounding. Of any value in the same way, wherever it is.
void activate_all(const Activation& activation, const Kernels& kernels, float* values, size_t count);

// The factor of the activated gate, of the product with the up row. A NaN stays one.
inline float up_factor(const Activation& activation, float v) {
    if (activation.function == Function::gated_relu && v < 0.0f) v = 0.0f;
    return std::max(std::min(v, activation.up_limit), -activation.up_limit) + activation.up_offset;
}

}  // namespace flashclient
