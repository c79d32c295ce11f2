#include "kernels/activation.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace flashclient {
namespace {

constexpr std::pair<std::string_view, Function> FUNCTIONS[] = {
    {"fatrelu", Function::fatrelu}, {"gated_relu", Function::gated_relu},
    {"gelu", Function::gelu},       {"gelu_tanh", Function::gelu_tanh},
    {"relu", Function::relu},       {"relu_squared", Function::relu_squared},
    {"silu", Function::silu},       {"swish", Function::swish},
};

}  // namespace

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
