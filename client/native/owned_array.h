// A numpy array that owns the memory of a vector, for results whose length only C++ knows.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <utility>
#include <vector>

namespace flashclient {

template <typename T>
nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<1>> owned_array(std::vector<T>&& values) {
    auto kept = std::make_unique<std::vector<T>>(std::move(values));
    std::vector<T>& held = *kept;
    const nanobind::capsule owner(kept.get(),
                                  [](void* pointer) noexcept { delete static_cast<std::vector<T>*>(pointer); });
    kept.release();
    return {held.data(), {held.size()}, owner};
}

}  // namespace flashclient
