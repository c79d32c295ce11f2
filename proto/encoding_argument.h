// Lets bindings take a weightd.v1.Encoding of Python as a weightd::Encoding.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "encoding.h"

NAMESPACE_BEGIN(NB_NAMESPACE)
NAMESPACE_BEGIN(detail)

template <>
struct type_caster<weightd::Encoding> {
    NB_TYPE_CASTER(weightd::Encoding, const_name("weightd_proto.weightd_pb2.Encoding"))

    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        try {
            value.format = cast<std::string>(source.attr("format"));
            value.block_values = cast<uint32_t>(source.attr("block_values"));
            value.block_bytes = cast<uint32_t>(source.attr("block_bytes"));
            const auto scales = cast<uint32_t>(source.attr("scales"));
            value.scales = static_cast<weightd::Scales>(scales);
            return value.block_values > 0 && scales <= static_cast<uint32_t>(weightd::Scales::after_values);
        } catch (const std::exception&) {  // not a message of that kind
            return false;
        }
    }
};

NAMESPACE_END(detail)
NAMESPACE_END(NB_NAMESPACE)
