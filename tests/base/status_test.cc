#include "base/status.h"

#include <gtest/gtest.h>

namespace kvern {
namespace {

TEST(Status, PrintsTheCodeAndTheSentence) {
  EXPECT_EQ(Status::ok().to_string(), "ok");
  EXPECT_EQ(Status(Code::kRefused, "the namespace names dtype fp4").to_string(),
            "refused: the namespace names dtype fp4");
}

TEST(Status, OfAResultIsOkWhenThereIsAValue) {
  EXPECT_TRUE(status_of(Result<int>(3)).is_ok());
  EXPECT_EQ(status_of(Result<int>(failure(Code::kBusy, "later"))).code(), Code::kBusy);
}

}  // namespace
}  // namespace kvern
