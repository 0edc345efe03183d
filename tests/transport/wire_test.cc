#include "transport/wire.h"

#include <gtest/gtest.h>

namespace kvern {
namespace {

TEST(WireStatus, SurvivesTheRoundTrip) {
  for (std::uint32_t code = 0; code <= static_cast<std::uint32_t>(Code::kInternal); ++code) {
    const Status status(static_cast<Code>(code), code == 0 ? "" : "why");
    wire::StatusMessage message;
    set_status(status, &message);
    EXPECT_EQ(message.code(), code);
    EXPECT_EQ(to_status(message).code(), status.code());
    EXPECT_EQ(to_status(message).message(), status.message());
  }
}

TEST(WireStatus, UnknownCodeIsAnInternalErrorNotAnOk) {
  wire::StatusMessage message;
  message.set_code(4711);
  message.set_message("from the future");
  EXPECT_EQ(to_status(message).code(), Code::kInternal);
  EXPECT_NE(to_status(message).message().find("4711"), std::string::npos);
}

TEST(AddCodec, SaysOneFormAloneAndThatThereAreSeveral) {
  std::string of_all;
  add_codec("int8", &of_all);
  add_codec("int8", &of_all);
  add_codec("", &of_all);
  EXPECT_EQ(of_all, "int8");
  add_codec("raw", &of_all);
  EXPECT_EQ(of_all, kMixedCodecs);
  add_codec("raw", &of_all);
  EXPECT_EQ(of_all, kMixedCodecs);
}

}  // namespace
}  // namespace kvern
