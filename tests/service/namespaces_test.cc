#include "service/namespaces.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "tests/service/service_fixture.h"

namespace kvern {
namespace {

using testing::as_fields;
using ::testing::HasSubstr;
using testing::model_facts;

std::string refusal(const std::map<std::string, std::string>& facts) {
  const auto shape = check_facts(facts);
  return shape ? "" : shape.error().message();
}

NamespaceRegistry make_registry() {
  return NamespaceRegistry([](const auto&) { return NamespaceTerms{.codec_spec = "raw", .storage = {}}; });
}

TEST(Namespaces, GoodFactsGiveTheShape) {
  const auto shape = check_facts(model_facts());
  ASSERT_TRUE(shape) << shape.error().message();
  EXPECT_EQ(shape->block_tokens, 4U);
  EXPECT_EQ(shape->chunk_tokens, 16U);
  EXPECT_EQ(shape->kv_dtype, DType::kBFloat16);
}

TEST(Namespaces, EveryRequiredFactIsMissedByName) {
  for (const auto& [name, value] : model_facts()) {
    auto facts = model_facts();
    facts.erase(name);
    EXPECT_THAT(refusal(facts), HasSubstr("\"" + name + "\"")) << name;
    facts[name] = "";
    EXPECT_THAT(refusal(facts), HasSubstr("\"" + name + "\"")) << name;
  }
}

TEST(Namespaces, UnknownFactsAreRefusedAndExtraOnesAreNot) {
  auto facts = model_facts();
  facts["colour"] = "blue";
  EXPECT_THAT(refusal(facts), HasSubstr("colour"));
  facts.erase("colour");
  facts["extra.colour"] = "blue";
  facts["lora"] = "3f";
  EXPECT_EQ(refusal(facts), "");
  facts["extra."] = "x";
  EXPECT_NE(refusal(facts), "");
}

TEST(Namespaces, ImpossibleValuesAreRefused) {
  const std::pair<const char*, const char*> wrong[] = {
      {"dtype", "fp4"},      {"dtype", "opaque"},    {"kv_dtype", "int3"},   {"weights", "not hex"},
      {"block_tokens", "0"}, {"block_tokens", "-1"}, {"chunk_tokens", "15"}, {"layers", "1000000"},
      {"kv_heads", "2 "},    {"key_dim", "0x8"},     {"value_dim", "1e3"},   {"layers", "99999999999999999999"}};
  for (const auto& [name, value] : wrong) {
    auto facts = model_facts();
    facts[name] = value;
    EXPECT_NE(refusal(facts), "") << name << "=" << value;
  }
}

TEST(Namespaces, TheTenantIsTheDaemonsToSay) {
  auto registry = make_registry();
  auto facts = model_facts();
  const auto mine = registry.add(as_fields(facts), "mine");
  const auto yours = registry.add(as_fields(facts), "yours");
  ASSERT_TRUE(mine && yours);
  EXPECT_NE((*mine)->id, (*yours)->id);
  facts["tenant"] = "yours";
  EXPECT_FALSE(registry.add(as_fields(facts), "mine"));
}

TEST(Namespaces, AFactThatIsThereTwiceIsRefused) {
  auto fields = as_fields(model_facts());
  fields.emplace_back("model", "other");
  EXPECT_FALSE(make_registry().add(fields, "default"));
}

TEST(Namespaces, TheSameFactsAreTheSameNamespaceInAnyOrder) {
  auto registry = make_registry();
  auto fields = as_fields(model_facts());
  const auto first = registry.add(fields, "default").value();
  std::reverse(fields.begin(), fields.end());
  EXPECT_EQ(registry.add(fields, "default").value(), first);
  EXPECT_EQ(registry.all().size(), 1U);
}

// The identifier decides whose cache a prompt may hit: its text must never change by accident.
TEST(Namespaces, TheIdentifierIsPinned) {
  EXPECT_EQ(canonical_text({{"b", "2"}, {"a", "1\n\\x"}}), "a=1\\n\\\\x\nb=2\n");
  EXPECT_EQ(namespace_id_of("default", "a=1\nb=2\n").to_hex(), "37a8eec14a73850fde34aad40ff8649b");
}

RC_GTEST_PROP(Namespaces, DifferentFactsHaveDifferentTexts, ()) {
  using Facts = std::map<std::string, std::string>;
  // Names are plain; values may hold anything.
  const auto name = rc::gen::nonEmpty(rc::gen::container<std::string>(rc::gen::inRange('a', 'd')));
  const auto value = rc::gen::container<std::string>(rc::gen::element('=', '\n', '\\', 'n', 'a', '\r'));
  const auto facts = rc::gen::container<Facts>(name, value);
  const Facts one = *facts;
  const Facts other = *facts;
  RC_ASSERT((one == other) == (canonical_text(one) == canonical_text(other)));
}

TEST(Namespaces, OneFactMoreOrLessIsAnotherNamespace) {
  auto registry = make_registry();
  const auto base = registry.add(as_fields(model_facts()), "default").value();
  for (const auto& [name, value] : std::map<std::string, std::string>{
           {"weights", "0a0c"}, {"lora", "77"}, {"rope", "theta=1000000"}, {"dtype", "float16"}, {"hash_seed", "1"}}) {
    auto facts = model_facts();
    facts[name] = value;
    EXPECT_NE(registry.add(as_fields(facts), "default").value()->id, base->id) << name;
  }
}

TEST(Namespaces, ThoseThatNobodyHoldsMakeRoom) {
  auto registry = make_registry();
  const auto held = registry.add(as_fields(model_facts()), "default").value();
  auto facts = model_facts();
  for (std::size_t i = 0; i < 2 * NamespaceRegistry::kMaxNamespaces; ++i) {
    facts["extra.number"] = std::to_string(i);
    ASSERT_TRUE(registry.add(as_fields(facts), "default")) << i;
  }
  EXPECT_LE(registry.all().size(), NamespaceRegistry::kMaxNamespaces);
  EXPECT_EQ(registry.find(held->id), held);
}

TEST(Namespaces, ShardsMustFit) {
  const auto shape = check_facts(model_facts()).value();
  const auto good = testing::model_shape(16);
  EXPECT_TRUE(shape.accepts(good, 2, 2));
  const auto bad = [&](auto change) {
    ShardShape shard = good;
    change(shard);
    return !shape.accepts(shard, 2, 2).is_ok();
  };
  EXPECT_TRUE(bad([](ShardShape& s) { s.dtype = DType::kFloat32; }));
  EXPECT_TRUE(bad([](ShardShape& s) { s.layers = 3; }));
  EXPECT_TRUE(bad([](ShardShape& s) { s.layer_begin = 1; }));
  EXPECT_TRUE(bad([](ShardShape& s) { s.layer_begin = UINT32_MAX; }));
  EXPECT_TRUE(bad([](ShardShape& s) { s.head_begin = UINT32_MAX - 1; }));
  EXPECT_TRUE(bad([](ShardShape& s) { s.heads = 0; }));
  EXPECT_TRUE(bad([](ShardShape& s) { s.tokens = 20; }));
  EXPECT_TRUE(bad([](ShardShape& s) { s.tokens = 3; }));
  EXPECT_TRUE(bad([](ShardShape& s) { s.key_dim = 16; }));
  EXPECT_FALSE(shape.accepts(good, 3, 2));
  EXPECT_FALSE(shape.accepts(good, 2, 4));
}

}  // namespace
}  // namespace kvern
