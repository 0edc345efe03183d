#include "connector/compaction.h"

#include <gtest/gtest.h>

namespace kvern {
namespace {

TEST(CompactionTerms, AreCanonicalAndKnownBeforeThePrompt) {
  const auto terms = compaction_terms("cake( budget = 12% )|int8", 1000);
  ASSERT_TRUE(terms);
  EXPECT_EQ(terms->slots, 120U);
  EXPECT_EQ(terms->query_rows, 32U);
  const auto again = compaction_terms(terms->spec, 1000);
  ASSERT_TRUE(again);
  EXPECT_EQ(again->spec, terms->spec);
}

TEST(CompactionTerms, DoNotNeedTheModelsRotation) {
  EXPECT_TRUE(compaction_terms("keydiff(budget=100) | unrotate | int8", 1000));
}

TEST(CompactionTerms, SayWhyThereAreNone) {
  EXPECT_NE(compaction_terms("h2o", 1000).error().message().find("whole prompt"), std::string::npos);
  EXPECT_EQ(compaction_terms("int8", 1000).error().code(), Code::kInvalid);
}

TEST(KeyRotation, IsWhatTheFactSays) {
  const auto turns = key_rotation("style=interleaved,theta=10000,dim=4");
  ASSERT_TRUE(turns);
  EXPECT_TRUE(turns->interleaved);
  ASSERT_EQ(turns->frequencies.size(), 2U);
  EXPECT_DOUBLE_EQ(turns->frequencies[0], 1);
  EXPECT_DOUBLE_EQ(turns->frequencies[1], 0.01);
  EXPECT_FALSE(key_rotation("style=neox,theta=10000,dim=4")->interleaved);
}

TEST(KeyRotation, RefusesWhatDependsOnTheLengthOfThePrompt) {
  EXPECT_EQ(key_rotation("style=neox,theta=10000,dim=4,scaling=dynamic").error().code(), Code::kInvalid);
  EXPECT_EQ(key_rotation("").error().code(), Code::kInvalid);
  EXPECT_EQ(key_rotation("dim=4)|int8(").error().code(), Code::kInvalid);
}

}  // namespace
}  // namespace kvern
