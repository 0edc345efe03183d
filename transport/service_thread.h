#pragma once

#include <pthread.h>
#include <signal.h>

#include <functional>
#include <string>
#include <thread>

namespace kvern {

/// Starts a named thread that takes no signals: those of the process belong to the program that loaded us (Python
/// handles them on its main thread), and blocking calls here are not interrupted. name: at most 15 characters.
inline std::thread start_service_thread(const std::string& name, std::function<void()> body) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread(std::move(body));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(thread.native_handle(), name.c_str());
  return thread;
}

}  // namespace kvern
