#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "kernels/codec.h"

namespace kvern {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string error_of(std::string_view spec) {
  const auto codec = make_codec(spec);
  if (codec) return "no error";
  EXPECT_EQ(codec.error().code(), Code::kInvalid);
  return codec.error().message();
}

TEST(MakeCodec, IgnoresSpacesAndEmptyParentheses) { EXPECT_TRUE(make_codec("  raw ( ) ")); }

TEST(MakeCodec, SaysWhatIsWrongAndWhatThereIs) {
  EXPECT_THAT(error_of("int9"), AllOf(HasSubstr("'int9'"), HasSubstr("raw")));
  EXPECT_THAT(error_of("raw(level=3)"), AllOf(HasSubstr("'level'"), HasSubstr("none")));
  EXPECT_THAT(error_of("raw | raw"), HasSubstr("quantises once"));
  EXPECT_THAT(error_of("raw | int9"), HasSubstr("'int9'"));
  for (const char* spec : {"", "|", "raw|", "(", "raw(", "raw)", "raw(a)", "raw(a=)", "raw(=1)", "raw(a=1", "raw(a=1,)",
                           "ra w", "raw(a=1)x", "raw(a=1)(b=2)"}) {
    EXPECT_THAT(error_of(spec), HasSubstr("not of the form")) << spec;
  }
  EXPECT_THAT(error_of(std::string(1000, 'a')), HasSubstr("at most"));
}

RC_GTEST_PROP(MakeCodec, AnswersAnyText, (std::string text)) {
  const auto codec = make_codec(text);
  RC_ASSERT(codec || !codec.error().message().empty());
}

}  // namespace
}  // namespace kvern
