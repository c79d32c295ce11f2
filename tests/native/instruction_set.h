// Tests whose parameter is an instruction set. Those that this processor does not have are skipped.
#pragma once

#include <gtest/gtest.h>

#include <stdexcept>

#include "kernels/kernels.h"

namespace flashclient {

class OfInstructionSet : public testing::TestWithParam<const char*> {
  protected:
    void SetUp() override {
        try {
            kernels_for(Dtype::f32, GetParam());
        } catch (const std::invalid_argument& error) {
            GTEST_SKIP() << error.what();
        }
    }
};

}  // namespace flashclient
