#include "store/s3_signer.h"

#include <gtest/gtest.h>

#include "store/s3_client.h"

namespace kvern {
namespace {

constexpr const char* kNothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// The last part of the authorization.
std::string signature(const SigV4Request& request, const S3Credentials& credentials, std::string_view service) {
  const std::string text = sigv4_authorization(request, credentials, "us-east-1", service);
  return text.substr(text.find("Signature=") + 10);
}

// AWS's test suite for Signature Version 4.
class SigV4Suite : public ::testing::Test {
 protected:
  const S3Credentials credentials{"AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", ""};
  SigV4Request request{.method = "GET",
                       .path = "/",
                       .query = {},
                       .headers = {{"host", "example.amazonaws.com"}, {"x-amz-date", "20150830T123600Z"}},
                       .payload_hash = kNothing};
};

TEST_F(SigV4Suite, GetVanilla) {
  EXPECT_EQ(sigv4_authorization(request, credentials, "us-east-1", "service"),
            "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/service/aws4_request, "
            "SignedHeaders=host;x-amz-date, "
            "Signature=5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31");
}

TEST_F(SigV4Suite, GetVanillaQueryOrderKeyCase) {
  request.query = {{"Param2", "value2"}, {"Param1", "value1"}};
  EXPECT_EQ(signature(request, credentials, "service"),
            "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500");
}

TEST_F(SigV4Suite, PostVanilla) {
  request.method = "POST";
  EXPECT_EQ(signature(request, credentials, "service"),
            "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b");
}

// The examples of the S3 documentation.
class SigV4OfS3 : public ::testing::Test {
 protected:
  const S3Credentials credentials{"AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", ""};
  SigV4Request request{.method = "GET",
                       .path = "/",
                       .query = {},
                       .headers = {{"host", "examplebucket.s3.amazonaws.com"},
                                   {"x-amz-content-sha256", kNothing},
                                   {"x-amz-date", "20130524T000000Z"}},
                       .payload_hash = kNothing};
};

TEST_F(SigV4OfS3, GetObjectWithARange) {
  request.path = "/test.txt";
  request.headers["range"] = "bytes=0-9";
  EXPECT_EQ(signature(request, credentials, "s3"), "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41");
}

TEST_F(SigV4OfS3, PutObjectWithAPayload) {
  const std::string text = "Welcome to Amazon S3.";
  const std::span<const std::byte> part = std::as_bytes(std::span(text));
  request.method = "PUT";
  request.path = "/test$file.text";
  request.headers["date"] = "Fri, 24 May 2013 00:00:00 GMT";
  request.headers["x-amz-storage-class"] = "REDUCED_REDUNDANCY";
  request.payload_hash = request.headers["x-amz-content-sha256"] = sha256_hex(std::span(&part, 1));
  EXPECT_EQ(signature(request, credentials, "s3"), "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd");
}

TEST_F(SigV4OfS3, GetBucketLifecycle) {
  request.query = {{"lifecycle", ""}};
  EXPECT_EQ(signature(request, credentials, "s3"), "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543");
}

TEST_F(SigV4OfS3, ListObjects) {
  request.query = {{"prefix", "J"}, {"max-keys", "2"}};
  EXPECT_EQ(signature(request, credentials, "s3"), "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7");
}

TEST(UriEncode, LeavesOnlyUnreservedCharacters) {
  EXPECT_EQ(uri_encode("az-AZ_09.~ /@:+%\xc3\xa9", false), "az-AZ_09.~%20%2F%40%3A%2B%25%C3%A9");
  EXPECT_EQ(uri_encode("/a b/", true), "/a%20b/");
  EXPECT_EQ(canonical_query({{"uploads", ""}, {"a/b", "c=d"}}), "a%2Fb=c%3Dd&uploads=");
}

TEST(AmzDate, IsUtc) { EXPECT_EQ(amz_date(1369353600), "20130524T000000Z"); }

TEST(XmlTexts, FindsAllElementsOfAName) {
  EXPECT_EQ(xml_texts("<A><Key>a&amp;b</Key><Keys>x</Keys><Key>&lt;c&gt;</Key></A>", "Key"),
            (std::vector<std::string>{"a&b", "<c>"}));
  EXPECT_TRUE(xml_texts("<Key>never ends", "Key").empty());
  EXPECT_TRUE(xml_texts("", "Key").empty());
  EXPECT_EQ(xml_escape("\"a<b>&\""), "\"a&lt;b&gt;&amp;\"");
}

}  // namespace
}  // namespace kvern
