#include "kernels/activation.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace flashclient {
namespace {

constexpr std::pair<std::string_view, Activation> ACTIVATIONS[] = {
    {"fatrelu", Activation::fatrelu}, {"gated_relu", Activation::gated_relu},
    {"gelu", Activation::gelu},       {"gelu_tanh", Activation::gelu_tanh},
    {"relu", Activation::relu},       {"relu_squared", Activation::relu_squared},
    {"silu", Activation::silu},
};

}  // namespace

std::vector<std::string_view> activation_names() {
    std::vector<std::string_view> names;
    for (const auto& [name, activation] : ACTIVATIONS) names.push_back(name);
    return names;
}

Activation activation_named(std::string_view wanted) {
    std::string known;
    for (const auto& [name, activation] : ACTIVATIONS) {
        if (name == wanted) return activation;
        known += (known.empty() ? "" : ", ") + std::string(name);
    }
    throw std::invalid_argument("no kernel for activation '" + std::string(wanted) + "': " + known + " have one");
}

}  // namespace flashclient
