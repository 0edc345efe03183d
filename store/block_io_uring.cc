#include <liburing.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "store/block_io.h"

namespace kvern {
namespace {

constexpr std::size_t kLongestFixedBuffer = std::size_t{1} << 30;  ///< the kernel's limit of one registered buffer
constexpr std::size_t kMostFixedBuffers = 1024;                    ///< the limit of kernels before 5.13

constexpr std::uint32_t kFlushDepth = 4;

enum class Kind { kRead, kWrite, kWriteThrough, kSync };

struct Request {
  Kind kind;
  std::uint32_t file;
  std::uint64_t offset;
  std::byte* data;
  std::size_t bytes;
  std::stop_token cancel;
  BlockDone done;
};

// One thread owns the ring: it takes what others have queued, submits, waits and runs the functions of what has ended.
// Others wake it through an eventfd that the ring reads, so that it has one place to sleep.
class UringBlockIo final : public BlockIo {
 public:
  UringBlockIo(const std::vector<int>& files, const BlockIoConfig& config)
      : reads_{.depth = config.read_depth}, writes_{.depth = config.write_depth}, flushes_{.depth = kFlushDepth} {
    // One more for the eventfd.
    const unsigned entries = reads_.depth + writes_.depth + flushes_.depth + 1;
    if (const int error = io_uring_queue_init(entries, &ring_, 0); error < 0) {
      throw std::system_error(-error, std::system_category(), "io_uring_setup");
    }
    try {
      require_operations();
      if (const int error = io_uring_register_files(&ring_, files.data(), static_cast<unsigned>(files.size()));
          error < 0) {
        throw std::system_error(-error, std::system_category(), "registering files");
      }
      register_memory(config.memory);
      wake_fd_ = ::eventfd(0, EFD_CLOEXEC);
      if (wake_fd_ < 0) throw std::system_error(errno, std::system_category(), "eventfd");
      thread_ = std::thread([this] { run(); });
    } catch (...) {
      close();
      throw;
    }
  }
  ~UringBlockIo() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake();
    thread_.join();
    close();
  }

  void read(std::uint32_t file, std::uint64_t offset, std::span<std::byte> into, std::stop_token cancel,
            BlockDone done) override {
    queue({Kind::kRead, file, offset, into.data(), into.size(), std::move(cancel), std::move(done)});
  }
  void write(std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from, bool through,
             BlockDone done) override {
    queue({through ? Kind::kWriteThrough : Kind::kWrite,
           file,
           offset,
           const_cast<std::byte*>(from.data()),
           from.size(),
           {},
           std::move(done)});
  }
  void sync(std::uint32_t file, BlockDone done) override {
    queue({Kind::kSync, file, 0, nullptr, 0, {}, std::move(done)});
  }
  std::string_view kind() const override { return "io_uring"; }

 private:
  /// Requests that do not wait for room behind those of other lanes.
  struct Lane {
    std::uint32_t depth;
    std::uint32_t in_flight = 0;
    std::deque<std::unique_ptr<Request>> waiting = {};
  };

  Lane& lane_of(const Request& request) {
    if (request.kind == Kind::kRead) return reads_;
    return request.kind == Kind::kWrite ? writes_ : flushes_;
  }

  void require_operations() {
    io_uring_probe* probe = io_uring_get_probe_ring(&ring_);
    if (probe == nullptr) throw std::system_error(EINVAL, std::system_category(), "probing io_uring");
    bool all = true;
    for (const int operation :
         {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED}) {
      all = all && io_uring_opcode_supported(probe, operation) != 0;
    }
    io_uring_free_probe(probe);
    if (!all) throw std::system_error(ENOSYS, std::system_category(), "an operation of io_uring");
  }

  void register_memory(const std::vector<std::span<std::byte>>& memory) {
    std::vector<iovec> pieces;
    for (auto rest : memory) {
      while (!rest.empty()) {
        const auto piece = rest.first(std::min(rest.size(), kLongestFixedBuffer));
        pieces.push_back({piece.data(), piece.size()});
        rest = rest.subspan(piece.size());
      }
    }
    if (pieces.empty() || pieces.size() > kMostFixedBuffers) return;
    if (io_uring_register_buffers(&ring_, pieces.data(), static_cast<unsigned>(pieces.size())) == 0) {
      fixed_ = std::move(pieces);
    }
  }

  // The registered buffer that holds the whole range; -1: none.
  int fixed_buffer(const std::byte* data, std::size_t bytes) const {
    const auto at = reinterpret_cast<std::uintptr_t>(data);
    for (std::size_t i = 0; i < fixed_.size(); ++i) {
      const auto begin = reinterpret_cast<std::uintptr_t>(fixed_[i].iov_base);
      if (at >= begin && at - begin <= fixed_[i].iov_len && bytes <= fixed_[i].iov_len - (at - begin)) {
        return static_cast<int>(i);
      }
    }
    return -1;
  }

  void queue(Request request) {
    bool first = false;
    {
      std::lock_guard lock(mutex_);
      first = incoming_.empty();  // or the thread has been woken for the others already, and takes all at once
      incoming_.push_back(std::make_unique<Request>(std::move(request)));
    }
    if (first) wake();
  }

  void wake() const {
    const std::uint64_t one = 1;
    while (::write(wake_fd_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

  void close() {
    io_uring_queue_exit(&ring_);
    if (wake_fd_ >= 0) ::close(wake_fd_);
  }

  void run() {
    pthread_setname_np(pthread_self(), "nvme-uring");
    listen();
    while (true) {
      const bool stopping = take_incoming();
      for (Lane* lane : {&reads_, &flushes_, &writes_}) begin(*lane, stopping);
      if (stopping && reads_.in_flight + writes_.in_flight + flushes_.in_flight == 0) {
        if (nothing_incoming()) return;  // a function may have queued more
        continue;
      }
      const int result = io_uring_submit_and_wait(&ring_, 1);
      if (result < 0 && result != -EINTR && result != -EAGAIN && result != -EBUSY) std::this_thread::yield();
      finish_ended();
    }
  }

  bool take_incoming() {
    std::lock_guard lock(mutex_);
    for (auto& request : incoming_) {
      lane_of(*request).waiting.push_back(std::move(request));
    }
    incoming_.clear();
    return stopping_;
  }

  bool nothing_incoming() {
    std::lock_guard lock(mutex_);
    return incoming_.empty();
  }

  void begin(Lane& lane, bool stopping) {
    while (!lane.waiting.empty() && (stopping || lane.in_flight < lane.depth)) {
      auto request = std::move(lane.waiting.front());
      lane.waiting.pop_front();
      if (stopping || request->cancel.stop_requested()) {
        request->done(-ECANCELED);
        continue;
      }
      prepare(*io_uring_get_sqe(&ring_), *request);  // never null: the ring has room for all depths
      static_cast<void>(request.release());          // finish_ended() takes it back
      ++lane.in_flight;
    }
  }

  void prepare(io_uring_sqe& entry, Request& request) const {
    const int file = static_cast<int>(request.file);
    const auto bytes = static_cast<unsigned>(request.bytes);
    const int fixed = request.kind == Kind::kSync ? -1 : fixed_buffer(request.data, request.bytes);
    switch (request.kind) {
      case Kind::kRead:
        if (fixed >= 0) {
          io_uring_prep_read_fixed(&entry, file, request.data, bytes, request.offset, fixed);
        } else {
          io_uring_prep_read(&entry, file, request.data, bytes, request.offset);
        }
        break;
      case Kind::kWrite:
      case Kind::kWriteThrough:
        if (fixed >= 0) {
          io_uring_prep_write_fixed(&entry, file, request.data, bytes, request.offset, fixed);
        } else {
          io_uring_prep_write(&entry, file, request.data, bytes, request.offset);
        }
        if (request.kind == Kind::kWriteThrough) entry.rw_flags = RWF_DSYNC;
        break;
      case Kind::kSync:
        io_uring_prep_fsync(&entry, file, IORING_FSYNC_DATASYNC);
        break;
    }
    entry.flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(&entry, &request);
  }

  // Its end (no data on it) says that somebody has queued something.
  void listen() {
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    io_uring_prep_read(entry, wake_fd_, &wake_count_, sizeof wake_count_, 0);
    io_uring_sqe_set_data(entry, nullptr);
  }

  void finish_ended() {
    io_uring_cqe* ended = nullptr;
    while (io_uring_peek_cqe(&ring_, &ended) == 0) {
      const auto result = std::int64_t{ended->res};
      std::unique_ptr<Request> request(static_cast<Request*>(io_uring_cqe_get_data(ended)));
      io_uring_cqe_seen(&ring_, ended);
      if (request == nullptr) {
        listen();
        continue;
      }
      Lane& lane = lane_of(*request);
      --lane.in_flight;
      if (result == -EINTR || result == -EAGAIN) {
        lane.waiting.push_front(std::move(request));
      } else {
        request->done(result);
      }
    }
  }

  io_uring ring_{};
  std::vector<iovec> fixed_;
  int wake_fd_ = -1;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Request>> incoming_;
  bool stopping_ = false;
  // Of the ring's thread.
  Lane reads_;
  Lane writes_;
  Lane flushes_;
  std::uint64_t wake_count_ = 0;
  std::thread thread_;
};

}  // namespace

Result<std::unique_ptr<BlockIo>> make_uring_block_io(const std::vector<int>& files, const BlockIoConfig& config) {
  try {
    return std::make_unique<UringBlockIo>(files, config);
  } catch (const std::system_error& error) {
    return failure(Code::kUnavailable, std::string("io_uring cannot be used (") + error.what() + ")");
  }
}

}  // namespace kvern
