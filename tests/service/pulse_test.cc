#include "service/pulse.h"

#include <gtest/gtest.h>

namespace kvern {
namespace {

constexpr std::int64_t kSecond = 1'000'000'000;

TEST(Pulse, TellsOfAThreadThatDoesNotTurnWhenItIsProdded) {
  std::uint64_t turns = 7;
  int prods = 0;
  bool hangs = false;
  Pulse pulse(
      "control",
      [&] {
        ++prods;
        if (!hangs) ++turns;
      },
      [&] { return turns; }, 30 * kSecond);
  EXPECT_EQ(pulse.trouble(1'000 * kSecond), "") << "nothing is known yet";
  EXPECT_EQ(pulse.trouble(2'000 * kSecond), "") << "it was not asked meanwhile";
  hangs = true;
  EXPECT_EQ(pulse.trouble(2'010 * kSecond), "");
  EXPECT_EQ(pulse.trouble(2'040 * kSecond), "");
  EXPECT_EQ(pulse.trouble(2'041 * kSecond), "the control thread has not turned for 31 s");
  EXPECT_EQ(pulse.trouble(2'060 * kSecond), "the control thread has not turned for 50 s");
  ++turns;
  EXPECT_EQ(pulse.trouble(2'061 * kSecond), "") << "it goes on";
  EXPECT_EQ(prods, 7);
}

}  // namespace
}  // namespace kvern
