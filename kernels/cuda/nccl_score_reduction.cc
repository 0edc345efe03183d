#include "kernels/cuda/nccl_score_reduction.h"

#include <dlfcn.h>

#include <string>
#include <type_traits>

namespace kvern {
namespace {

/// What nccl.h (2.x, whose ABI these are part of) declares.
struct UniqueId {
  NcclId bytes;
};
struct Communicator;
constexpr int kSuccess = 0;
constexpr int kFloat32 = 7;
constexpr int kFloat64 = 8;
constexpr int kSum = 0;
constexpr int kAverage = 4;

/// libnccl, opened when it is first needed and never closed: it keeps threads of its own.
struct Library {
  int (*get_unique_id)(UniqueId*) = nullptr;
  int (*init_rank)(Communicator**, int ranks, UniqueId, int rank) = nullptr;
  int (*all_reduce)(const void*, void*, std::size_t, int dtype, int op, Communicator*, CUstream_st*) = nullptr;
  int (*destroy)(Communicator*) = nullptr;
  const char* (*error_string)(int) = nullptr;
  /// Why it cannot be used.
  Status status;

  Library() {
    void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      status = {Code::kUnavailable, std::string("score reduction: NCCL cannot be opened: ") + dlerror()};
      return;
    }
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr) {
        status = {Code::kUnavailable, std::string("score reduction: libnccl.so.2 has no ") + name};
      }
    };
    find(get_unique_id, "ncclGetUniqueId");
    find(init_rank, "ncclCommInitRank");
    find(all_reduce, "ncclAllReduce");
    find(destroy, "ncclCommDestroy");
    find(error_string, "ncclGetErrorString");
  }

  static const Library& instance() {
    static const Library library;
    return library;
  }
  Status outcome(const char* what, int result) const {
    if (result == kSuccess) return Status::ok();
    return {Code::kInternal, std::string("score reduction: ") + what + ": " + error_string(result)};
  }
};

class NcclReduction final : public ScoreReduction {
 public:
  NcclReduction(const Library& library, Communicator* communicator, std::uint32_t ranks, CUstream_st* stream)
      : library_(library), communicator_(communicator), ranks_(ranks), stream_(stream) {}
  ~NcclReduction() override { library_.destroy(communicator_); }
  NcclReduction(const NcclReduction&) = delete;
  NcclReduction& operator=(const NcclReduction&) = delete;

  std::uint32_t ranks() const override { return ranks_; }
  Status sum(std::span<double> values) override { return reduce(values.data(), values.size(), kFloat64, kSum); }
  Status mean(std::span<float> values) override { return reduce(values.data(), values.size(), kFloat32, kAverage); }

 private:
  Status reduce(void* values, std::size_t count, int dtype, int operation) {
    return library_.outcome("ncclAllReduce",
                            library_.all_reduce(values, values, count, dtype, operation, communicator_, stream_));
  }

  const Library& library_;
  Communicator* communicator_;
  std::uint32_t ranks_;
  CUstream_st* stream_;
};

}  // namespace

Result<NcclId> make_nccl_id() {
  const Library& library = Library::instance();
  if (!library.status) return failure(library.status);
  UniqueId id{};
  if (Status status = library.outcome("ncclGetUniqueId", library.get_unique_id(&id)); !status) return failure(status);
  return id.bytes;
}

Result<std::unique_ptr<ScoreReduction>> make_nccl_reduction(const NcclId& id, std::uint32_t rank, std::uint32_t ranks,
                                                            CUstream_st* stream) {
  const Library& library = Library::instance();
  if (!library.status) return failure(library.status);
  if (rank >= ranks) {
    return failure(Code::kInvalid,
                   "score reduction: there is no rank " + std::to_string(rank) + " of " + std::to_string(ranks));
  }
  Communicator* communicator = nullptr;
  const int result = library.init_rank(&communicator, static_cast<int>(ranks), {id}, static_cast<int>(rank));
  if (Status status = library.outcome("ncclCommInitRank", result); !status) return failure(status);
  return std::make_unique<NcclReduction>(library, communicator, ranks, stream);
}

}  // namespace kvern
