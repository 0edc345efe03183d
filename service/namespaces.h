#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "base/keys.h"
#include "base/status.h"
#include "kernels/kv_shape.h"
#include "store/storage_terms.h"

namespace kvern {

/// Named facts that decide what cached bytes mean. A client sends them; the daemon adds the tenant of the credential.
///
/// Required, none of them empty:
///   model            name, for people and for [[namespace]] rules
///   weights          fingerprint of the weights, one word: a retrained model at the same path must miss
///   dtype            of the model: float32 | float16 | bfloat16
///   kv_dtype         of the cache: float32 | float16 | bfloat16 | opaque
///   block_tokens     tokens per block of the engine
///   chunk_tokens     tokens per full chunk, a multiple of block_tokens
///   hash_algorithm   how the engine makes its block hashes
///   hash_seed        what it seeds them with
///   layers           over all groups and all ranks
///   kv_heads         over all ranks
///   key_dim, value_dim
///   groups           the KV-cache groups, as the engine side describes them
///   rope             parameters of the position encoding, "none" without one
/// Optional:
///   rotation         how keys are turned, as the parameters of a codec chain's unrotate step (docs/format.md)
///   lora, quantization, kv_scales, epoch, max_position, extra.<anything>
/// Any other name is refused: a fact that this daemon does not know cannot be ignored safely.

/// The facts that the daemon itself works with, parsed and within sane limits.
struct NamespaceShape {
  DType kv_dtype = DType::kBFloat16;
  std::uint32_t block_tokens = 0;
  std::uint32_t chunk_tokens = 0;
  std::uint32_t layers = 0;
  std::uint32_t kv_heads = 0;
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;

  /// Whether a shard of a chunk can belong to this namespace; a sentence when it cannot. The product of all its sizes
  /// is then far from overflow.
  Status accepts(const ShardShape& shard, std::uint32_t group_layers, std::uint32_t model_heads) const;
};

/// What the configuration says of a namespace.
struct NamespaceTerms {
  std::string codec_spec;  ///< of fresh chunks
  StorageTerms storage;
};

struct Namespace {
  NamespaceId id;
  std::map<std::string, std::string> facts;  ///< with the tenant
  std::string tenant;
  std::string codec_spec;
  StorageTerms storage;
  NamespaceShape shape;

  const std::string& fact(const std::string& name) const;
};

/// "name=value\n" in the order of names; a backslash, a newline and a carriage return in a value are written as \\, \n
/// and \r.
std::string canonical_text(const std::map<std::string, std::string>& facts);
/// The first four bytes of SHA-256 over the tenant's name, then the first twelve of that over the text, in which the
/// tenant is a fact, too: namespaces of two tenants differ in both.
NamespaceId namespace_id_of(const std::string& tenant, const std::string& canonical_text);
/// Those of the tenant, whether they are known here or not.
NamespaceSet namespaces_of_tenant(const std::string& tenant);
/// Checks names and values. kRefused or kInvalid with a sentence that names the fact.
Result<NamespaceShape> check_facts(const std::map<std::string, std::string>& facts);

/// All namespaces that sessions have named. Thread-safe. Those that no session holds any more are remembered for
/// explanations as long as there is room.
class NamespaceRegistry {
 public:
  /// Chooses the terms of a new namespace from its facts; kRefused with a sentence when there are none that suit it.
  using TermsChooser = std::function<Result<NamespaceTerms>(const std::map<std::string, std::string>& facts)>;
  static constexpr std::size_t kMaxNamespaces = 4096;

  explicit NamespaceRegistry(TermsChooser choose_terms) : choose_terms_(std::move(choose_terms)) {}

  Result<std::shared_ptr<const Namespace>> add(const std::vector<std::pair<std::string, std::string>>& fields,
                                               const std::string& tenant);
  std::shared_ptr<const Namespace> find(const NamespaceId& id) const;
  std::vector<std::shared_ptr<const Namespace>> all() const;

 private:
  const TermsChooser choose_terms_;
  mutable std::mutex mutex_;
  std::unordered_map<NamespaceId, std::shared_ptr<const Namespace>> by_id_;
};

}  // namespace kvern
