// The activations of FFNs: their names and formulas.
#pragma once

#include <cmath>
#include <string_view>
#include <vector>

namespace flashclient {

// relu_squared: relu(v)^2 (Persimmon). fatrelu: v above a threshold, else 0 (ProSparse, arXiv 2402.13516). gated_relu:
// relu of gate and of up (dReLU: TurboSparse, arXiv 2406.05955; Bamboo).
enum class Activation { relu, relu_squared, fatrelu, silu, gelu, gelu_tanh, gated_relu };

// Throws std::invalid_argument, which lists the known names.
Activation activation_named(std::string_view name);
std::vector<std::string_view> activation_names();

// In fp32; gelu and gelu_tanh as torch.nn.functional.gelu has them. `threshold`: of fatrelu.
inline float activate(Activation activation, float threshold, float v) {
    switch (activation) {
        case Activation::relu:
        case Activation::gated_relu:
            return v < 0.0f ? 0.0f : v;
        case Activation::relu_squared:
            return v < 0.0f ? 0.0f : v * v;
        case Activation::fatrelu:
            return v <= threshold ? 0.0f : v;
        case Activation::silu:
            return v / (1.0f + std::exp(-v));
        case Activation::gelu:
            return 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f));
        case Activation::gelu_tanh:
            return 0.5f * v * (1.0f + std::tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    }
    return v;
}

}  // namespace flashclient
