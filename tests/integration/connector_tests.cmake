kvern_test(test_integration_connector
  SOURCES connector_test.cc
  USES connector
  LABELS integration
  TIMEOUT 300)
add_dependencies(test_integration_connector kvernd kvern_ucx)
target_compile_definitions(test_integration_connector PRIVATE
  KVERND_PATH="$<TARGET_FILE:kvernd>" KVERN_UCX_PATH="$<TARGET_FILE:kvern_ucx>")

kvern_test(test_integration_compaction
  SOURCES compaction_test.cc
  USES connector
  LIBRARIES nlohmann_json::nlohmann_json
  LABELS integration
  TIMEOUT 300)
add_dependencies(test_integration_compaction kvernd kvernctl)
target_compile_definitions(test_integration_compaction PRIVATE
  KVERND_PATH="$<TARGET_FILE:kvernd>" KVERNCTL_PATH="$<TARGET_FILE:kvernctl>")
