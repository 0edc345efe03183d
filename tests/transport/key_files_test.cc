#include "transport/key_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace kvern {
namespace {

using ::testing::HasSubstr;

class KeyFiles : public ::testing::Test {
 protected:
  KeyFiles() {
    std::filesystem::create_directories(folder);
    std::filesystem::permissions(folder, std::filesystem::perms::all);
  }
  ~KeyFiles() override { std::filesystem::remove_all(folder); }

  std::string write(const std::string& name, const std::string& text) const {
    std::ofstream(folder / name) << text;
    return folder / name;
  }

  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("kvern-keys-" + std::to_string(::getpid()) + "-" +
                                                ::testing::UnitTest::GetInstance()->current_test_info()->name());
  const std::string key = std::string(40, 'k');
};

TEST_F(KeyFiles, AllowedClientsMayBeAdministrators) {
  const auto clients = read_allowed_clients_file(write("clients", "# ours\nteam " + key + "\nops " + key + " admin\n"));
  ASSERT_TRUE(clients) << clients.error().message();
  ASSERT_EQ(clients->size(), 2U);
  EXPECT_FALSE((*clients)[0].admin);
  EXPECT_TRUE((*clients)[1].admin);
  for (const char* rest : {" root", " admin too"}) {
    const auto wrong = read_allowed_clients_file(write("wrong", "team " + key + rest + "\n"));
    ASSERT_FALSE(wrong);
    EXPECT_THAT(wrong.error().message(), HasSubstr("wrong:1: after the key there may be"));
  }
}

TEST_F(KeyFiles, SaysWhyAFileCannotBeRead) {
  EXPECT_THAT(read_public_key_file(folder / "none").error().message(), HasSubstr("kvernctl keygen"));
}

/// Whether that user, of that group alone, can read it.
bool reads_as(const std::string& path, uid_t user, gid_t group) {
  const pid_t child = ::fork();
  if (child == 0) {
    const bool changed = ::setgid(group) == 0 && ::setuid(user) == 0;
    ::_exit(changed && read_secret_key_file(path) ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST_F(KeyFiles, SecretsOfRootMayBeReadByTheirGroup) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  const std::string path = write("secret", "public = " + key + "\nsecret = " + key + "\n");
  constexpr gid_t kGroup = 4711;
  constexpr uid_t kUser = 10001;
  ASSERT_EQ(::chown(path.c_str(), 0, kGroup), 0);
  ASSERT_EQ(::chmod(path.c_str(), 0440), 0);
  EXPECT_TRUE(reads_as(path, kUser, kGroup)) << "so Kubernetes mounts secrets";
  EXPECT_FALSE(reads_as(path, kUser, kGroup + 1));
  ASSERT_EQ(::chmod(path.c_str(), 0444), 0);
  EXPECT_FALSE(reads_as(path, kUser, kGroup));
  ASSERT_EQ(::chown(path.c_str(), kUser, kGroup), 0);
  ASSERT_EQ(::chmod(path.c_str(), 0640), 0);
  EXPECT_FALSE(reads_as(path, kUser, kGroup)) << "its owner can mend it";
  EXPECT_FALSE(read_secret_key_file(path));
}

}  // namespace
}  // namespace kvern
